"""Rows of similar length together: padding is read like text, and behind a target it is often most of what is read.

Attention, and so every row's states, do not depend on the other rows of a batch. A column may therefore be run in
parts, each as wide as its own longest row: the same loss and gradients from fewer positions. (With dropout the masks
are drawn in another order, as with any other order of rows.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from st_btok.training.slicing import row_offsets, take_rows

# What one more call costs, in positions that could be read in the same time: some for the weights and their gradients,
# which are read and written once more, and some for starting the kernels, fewer the larger the model is. Measured on
# one core for widths from 64 to 896, and on an H100 for width 576 with LoRA: 0.17 s, forward and backward, 30 layers.
_WEIGHTS = 20
_STARTS = {"cpu": 5e5}  # times the square of the width
_STARTS_ON_ACCELERATOR = 5e9
# With targets inside of the graph each part keeps a gradient of the LM head, which is large, until the backward pass.
_MOST_PARTS_IN_GRAPH = 4


def call_cost(backbone: PreTrainedModel) -> int:
    """What one more call of the model costs.

    Args:
        backbone: The backbone inside the `Transformer` module.

    Returns:
        How many positions it could read in the same time.
    """
    # A trained vocabulary gets a gradient of its own size in every call, however few of its rows were looked up.
    rows = list(backbone.get_input_embeddings().parameters())
    trained = sum(parameter.numel() for parameter in rows if parameter.requires_grad)
    all_rows = sum(parameter.numel() for parameter in rows)
    layers = sum(parameter.numel() for parameter in backbone.get_decoder().parameters()) - all_rows
    width = getattr(backbone.config.get_text_config(decoder=True), "hidden_size", 1)
    starts = _STARTS.get(backbone.device.type, _STARTS_ON_ACCELERATOR) / width**2
    return round(_WEIGHTS * (1 + trained / max(1, layers)) + starts)


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


def length_buckets(lengths: list[int], cost: int, most: int | None = None) -> list[list[int]]:
    """Split rows into parts of neighbouring lengths, so that the fewest positions are read.

    Args:
        lengths: Length of each row in tokens.
        cost: From `call_cost`: what each part costs beside its positions.
        most: Positions of a part, padding included, unless it is a single row; None: any number.

    Returns:
        Row numbers by part, the shortest first, ascending within each part, so that a single part leaves the batch as
        it is.
    """
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
    least = np.zeros(len(lengths) + 1)  # of the first rows, in the best split
    begins = [0]  # where the last part of that split begins
    for end, row in enumerate(by_length, 1):
        sizes = end - np.arange(end)
        positions = sizes * lengths[row]  # every row is padded to the longest of its part
        totals = least[:end] + positions + cost
        if most is not None:
            totals[(positions > most) & (sizes > 1)] = np.inf
        begins.append(int(totals.argmin()))
        least[end] = totals[begins[-1]]
    parts, end = [], len(lengths)
    while end:
        parts.append(sorted(by_length[begins[end] : end]))
        end = begins[end]
    return parts[::-1] or [[]]


def is_split(features: dict[str, Any], cost: int) -> bool:
    """Whether `split_by_length` cuts a column that generates nothing.

    Args:
        features: Features of B rows.
        cost: From `call_cost`.

    Returns:
        True where it saves padding.
    """
    return len(length_buckets(row_lengths(features, None), cost)) > 1


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
    features: dict[str, Any], targets: list[Tensor], media_tokens: dict[str, int], cost: int, apart: bool = False
) -> list[Part]:
    """A column in parts of similar length; in one, its own dict of features, where splitting saves nothing.

    Args:
        features: Features of B rows.
        targets: B id tensors.
        media_tokens: Ids of the placeholder tokens by kind, as for `row_offsets`.
        cost: From `call_cost`.
        apart: The targets are read in calls of their own, so a row's length is that of its input.

    Returns:
        Parts that together hold every row once.
    """
    whole = [Part(list(range(len(targets))), features, targets)]
    lengths = row_lengths(features, None if apart else targets)
    buckets = length_buckets(lengths, cost)
    while not apart and any(map(len, targets)) and len(buckets) > _MOST_PARTS_IN_GRAPH:
        cost *= 2
        buckets = length_buckets(lengths, cost)
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
