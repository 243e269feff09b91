"""Rows of similar length together: padding is read like text, and behind a target it is often most of what is read.

Attention, and so every row's states, do not depend on the other rows of a batch. A column may therefore be run in
parts, each as wide as its own longest row: the same loss and gradients from fewer positions. (With dropout the masks
are drawn in another order, as with any other order of rows.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st_btok.training.slicing import row_offsets, take_rows

MAX_BUCKETS = 4
# What one more call costs on a CPU, in positions: below this much saved padding it does not pay.
_CALL = 128
# On an accelerator a call of few positions takes as long as its kernels take to be started, whatever they read: on an
# H100, 0.17 s forward and backward for 30 layers of width 576 with LoRA. In that time it could read about this many
# positions, times the square of the width.
_CALL_ON_ACCELERATOR = 5e9


def call_cost(device: torch.device, width: int) -> int:
    """What one more call of the model costs.

    Args:
        device: Where the model runs.
        width: Width D of its states.

    Returns:
        How many positions it could read in the same time.
    """
    return _CALL if device.type == "cpu" else max(_CALL, round(_CALL_ON_ACCELERATOR / width**2))


def row_lengths(features: dict[str, Any], targets: list[Tensor] | None) -> list[int]:
    """Real tokens of every row, its target included.

    Args:
        features: Features of B rows.
        targets: B id tensors, or None where nothing is generated.

    Returns:
        B lengths.
    """
    lengths = features["attention_mask"].sum(1).tolist()
    return lengths if targets is None else [n + len(target) for n, target in zip(lengths, targets, strict=True)]


def length_buckets(lengths: list[int], cost: int = _CALL) -> list[list[int]]:
    """Split rows into 1, 2 or 4 parts of neighbouring lengths, whichever reads the fewest positions.

    Args:
        lengths: Length of each row in tokens.
        cost: From `call_cost`.

    Returns:
        Row numbers by part, ascending within each part, so that a single part leaves the batch as it is.
    """
    best = [list(range(len(lengths)))]
    if len(lengths) < 2:
        return best
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
    least = len(lengths) * max(lengths)
    for parts in (2, MAX_BUCKETS):
        size = -(-len(lengths) // parts)
        split: list[list[int]] = []
        positions = -cost  # the first call is there in any case; each further one has to earn its cost
        for start in range(0, len(lengths), size):
            rows = by_length[start : start + size]
            split.append(sorted(rows))
            positions += len(rows) * lengths[rows[-1]] + cost  # every row is padded to the longest of its part
        if positions < least:
            best, least = split, positions
    return best


def is_split(features: dict[str, Any], width: int) -> bool:
    """Whether `split_by_length` cuts a column that generates nothing.

    Args:
        features: Features of B rows.
        width: Width D of the model's states.

    Returns:
        True where it saves padding.
    """
    return len(_buckets(features, None, width)) > 1


def _buckets(features: dict[str, Any], targets: list[Tensor] | None, width: int) -> list[list[int]]:
    return length_buckets(row_lengths(features, targets), call_cost(features["input_ids"].device, width))


@dataclass(frozen=True)
class Part:
    """Some rows of a column, as a column of their own.

    Attributes:
        rows: Their numbers in the column.
        features: Their features.
        targets: What they generate.
    """

    rows: list[int]
    features: dict[str, Any]
    targets: list[Tensor]

    @property
    def generated(self) -> list[Tensor] | None:
        """The targets, None where no row has one."""
        return self.targets if any(map(len, self.targets)) else None


def split_by_length(
    features: dict[str, Any], targets: list[Tensor], media_tokens: dict[str, int], width: int, apart: bool = False
) -> list[Part]:
    """A column in parts of similar length; in one, its own dict of features, where splitting saves nothing.

    Args:
        features: Features of B rows.
        targets: B id tensors.
        media_tokens: Ids of the placeholder tokens by kind, as for `row_offsets`.
        width: Width D of the model's states.
        apart: The targets are read in calls of their own, so a row's length is that of its input.

    Returns:
        At most `MAX_BUCKETS` parts that hold every row once.
    """
    whole = [Part(list(range(len(targets))), features, targets)]
    buckets = _buckets(features, None if apart else targets, width)
    if len(buckets) == 1:
        return whole
    try:
        offsets = row_offsets(features, media_tokens)
    except ValueError:  # a processor whose media can't be told apart by rows: slower, not wrong
        return whole
    return [Part(rows, take_rows(features, rows, offsets), [targets[row] for row in rows]) for rows in buckets]


def in_order(parts: list[Part], embed: Callable[[int, Part], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Every part through the model, and the results in the order of the column's rows.

    Args:
        parts: From `split_by_length`.
        embed: From a part's number and the part, its (b, ...) embeddings and (b,) NLL, or (0,) without targets.

    Returns:
        (B, ...) embeddings and (B,) NLL, or (0,) where no part has targets.
    """
    found = [embed(number, part) for number, part in enumerate(parts)]
    embeddings = torch.cat([embedding for embedding, _ in found])
    order = torch.tensor([row for part in parts for row in part.rows], device=embeddings.device).argsort()
    sums = [nll for _, nll in found]
    if not any(map(len, sums)):  # no target, or a loss modifier's repeated call
        return embeddings[order], sums[0]
    sums = [nll if len(nll) else nll.new_zeros(len(part.rows)) for nll, part in zip(sums, parts, strict=True)]
    return embeddings[order], torch.cat(sums)[order]
