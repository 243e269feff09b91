"""One batch spread over many processes: what makes N processes compute the loss of the N-fold batch.

Every process computes the loss of the *whole* batch from everybody's embeddings, of which only its own carry a
gradient. So the value is the same on each process, any ranking loss is right as it stands (no rank offsets), batches
may differ in size, and nothing is communicated in the backward pass, which suits cached losses. DDP and FSDP then
average parameter gradients over the processes, where a sum is meant: `across_processes` scales for that.

Outside of a process group every function here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.util.distributed import get_rank, get_world_size
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, in the order of their ranks; the own rows keep their gradient.

    A collective call: every process must make it. The numbers of rows may differ, also be 0; all further sizes are
    equal.
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
    """`gather_rows` for the (B, D) embeddings of every column at once.

    A `ValueError` on every process if one of them has another number of columns.
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


def token_mean(total: Tensor, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """Sum of `total` / sum of `count` over all processes (0 without any token), and the latter. A collective call.

    The gradient is that of the own tokens; `total` may be a constant 0 on a process without any.
    """
    sums = torch.stack([total.detach().float(), torch.as_tensor(count, device=total.device).float()])
    if get_world_size() > 1:
        dist.all_reduce(sums)
    all_total, all_count = sums.unbind()
    tokens = all_count.clamp(min=1)
    own = total.float() / tokens
    return all_total / tokens + (own - own.detach()), all_count


def across_processes(loss: Tensor) -> Tensor:
    """The same value with a gradient times the number of processes, which undoes the mean that DDP and FSDP take.

    For a loss of the whole batch whose gradient comes from the own rows only.
    """
    world = get_world_size()
    # Value: (world - (world - 1)) · loss. Gradient: world times, because the second part is a constant.
    return loss if world == 1 else loss * world - loss.detach() * (world - 1)


@contextmanager
def parameters_in_use(model: nn.Module, first: nn.Module) -> Iterator[None]:
    """Inside this block, each pass through a DDP model counts as using every trainable parameter.

    DDP waits in the backward pass until all parameters have reported. A trainable vision tower does not run on a
    process whose rows are all text: with `find_unused_parameters=False` DDP then hangs or raises. With `True` (the
    Trainer's default) it looks at the last forward pass only, and raises if images came in an earlier column. Here the
    output of every pass hangs on every parameter, with no gradient and at no cost, so both settings are right. A
    parameter that no process used gets the gradient 0. Models that are not wrapped by DDP are left alone.
    """

    def attach(module: nn.Module, args: tuple[Any, ...], output: dict[str, Any]) -> dict[str, Any]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return {**output, "token_embeddings": _Attach.apply(output["token_embeddings"], *trained)}

    if not isinstance(model, DistributedDataParallel):
        yield
        return
    handle = first.register_forward_hook(attach)
    try:
        yield
    finally:
        handle.remove()


class _Attach(torch.autograd.Function):
    """The first argument, as an output that depends on all others with the gradient None."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0], *[None] * ctx.count)


def _all_gather(tensor: Tensor) -> list[Tensor]:
    # torch refuses to send a view with strides, which a slice of columns is.
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
