"""One batch spread over many processes: what makes N processes compute the loss of the N-fold batch.

Every process computes the loss of the *whole* batch from everybody's embeddings, of which only its own carry a
gradient. So the value is the same on each process, any ranking loss is right as it stands (no rank offsets), batches
may differ in size, and nothing is communicated in the backward pass, which suits cached losses. DDP and FSDP then
average parameter gradients over the processes, where a sum is meant: `across_processes` scales for that.

Outside of a process group every function here returns what it was given.
"""

from __future__ import annotations

import torch
from sentence_transformers.util.distributed import get_rank, get_world_size
from torch import Tensor
from torch import distributed as dist


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; the own rows keep their gradient.

    A collective call: every process must make it. The numbers of rows may differ, also be 0.

    Args:
        rows: (B, ...) of any dtype; all further sizes equal on all processes.

    Returns:
        (sum of all B, ...), the dtype of `rows`.
    """
    if get_world_size() == 1:
        return rows
    sizes = _all_gather(torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(sizes).max())
    padded = torch.cat([rows.detach(), rows.new_zeros((longest - len(rows), *rows.shape[1:]))])
    parts = [part[: int(size)] for part, size in zip(_all_gather(padded), sizes, strict=True)]
    parts[get_rank()] = rows
    return torch.cat(parts)


def gather_columns(columns: list[Tensor]) -> list[Tensor]:
    """`gather_rows` for the embeddings of every column at once.

    Args:
        columns: One (B, D) tensor per column, all of the same shape.

    Returns:
        As many tensors (sum of all B, D).

    Raises:
        ValueError: If another process has another number of columns, on every process.
    """
    if get_world_size() == 1:
        return columns
    counts = torch.cat(_all_gather(torch.tensor([len(columns)], device=columns[0].device))).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"all processes must train on the same number of columns at a time, the ranks have {counts}. Give all "
            "data sets of one training the same number of negatives, or set gather_across_devices=False."
        )
    return list(gather_rows(torch.stack(columns, 1)).unbind(1))


def sum_over_processes(*values: Tensor | float) -> list[Tensor]:
    """Sums over all processes, without gradient. A collective call.

    Args:
        *values: Scalars; at least one of them a tensor, whose device is used.

    Returns:
        One float32 scalar for each.
    """
    device = next(value.device for value in values if isinstance(value, Tensor))
    sums = torch.stack([torch.as_tensor(value, device=device).detach().float() for value in values])
    if get_world_size() > 1:
        dist.all_reduce(sums)
    return list(sums.unbind())


def token_mean(total: Tensor, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean over the tokens of all processes, with the gradient of the own tokens. A collective call.

    Args:
        total: Sum over the own tokens; may carry a gradient, or be a constant 0 on a process without tokens.
        count: The number of own tokens.

    Returns:
        sum over processes of `total` / sum over processes of `count` (0 without any token), and the latter sum.
    """
    all_total, all_count = sum_over_processes(total, count)
    tokens = all_count.clamp(min=1)
    own = total.float() / tokens
    return all_total / tokens + (own - own.detach()), all_count


def across_processes(loss: Tensor) -> Tensor:
    """The same value with a gradient times the number of processes, which undoes the mean that DDP and FSDP take.

    Args:
        loss: A loss of the whole batch whose gradient comes from the own rows only.

    Returns:
        The loss to call `backward` on.
    """
    world = get_world_size()
    return loss if world == 1 else loss * world - loss.detach() * (world - 1)


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
