"""Parts of a batch: which rows run in one call of the model, and which entries of every feature belong to a row.

The model computes padding like text. A row's states do not depend on the other rows of its batch. So a column may run
in parts, each padded to its own longest row: the loss and its gradients are the same, from fewer positions. (Dropout
draws its masks in another order, as with any other order of rows.)

Token tensors have one entry per row. Media tensors often do not: the images of a batch are stacked one after the
other, per image (LLaVA, Gemma), per tile (InternVL) or per patch (Qwen-VL). sentence-transformers counts some of them
per row. For the others, the placeholder tokens of the rows tell how many entries each row has.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

# The cost of one more call, as the number of positions that could be computed in the same time. It has two parts:
# reading and writing the weights and their gradients once more, and starting the kernels, which weighs less the larger
# the model is. Measured on one core for widths from 64 to 896, and on an H100 for width 576 with LoRA: 0.17 s, forward
# and backward, 30 layers.
_WEIGHTS = 20
_STARTS = {"cpu": 5e5}  # divided by the square of the width
_STARTS_ON_ACCELERATOR = 5e9
# Each part with targets keeps a gradient of the LM head, which is large, until the backward pass.
_MAX_PARTS_WITH_TARGETS = 4

_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_COUNTS = {"image": "num_images_per_sample", "video": "num_videos_per_sample"}
# Processors that emit one of these, of so many axes, pad the images of every sample to one number: sample first, then
# image. (LFM2-VL's mask of pixels has two axes: tile first.)
_SAMPLE_FIRST = {"pixel_attention_mask": 4, "aspect_ratio_ids": 2}
_MEDIA_WORDS = (
    "pixel", "image", "video", "audio", "input_features", "feature_attention_mask", "second_per_grid",
    "spatial_shapes", "target_sizes",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Some rows of a column, as a column of their own."""

    features: dict[str, Any]  # as `model.preprocess` makes them
    targets: list[Tensor] | None = None  # what each row generates: ids, empty for nothing; None: no row does
    rows: list[int] | None = None  # their numbers in the column; None: all of them, in their order


# --- which rows run together ----------------------------------------------------------------------------------------


def call_cost(backbone: PreTrainedModel) -> int:
    """The cost of one more call: the number of positions that the backbone could compute in the same time."""
    # A trained vocabulary gets a gradient of its own size in every call, however few of its rows were looked up.
    vocabulary = list(backbone.get_input_embeddings().parameters())
    size = sum(parameter.numel() for parameter in vocabulary)
    trained = sum(parameter.numel() for parameter in vocabulary if parameter.requires_grad)
    layers = sum(parameter.numel() for parameter in backbone.get_decoder().parameters()) - size
    width = getattr(backbone.config.get_text_config(decoder=True), "hidden_size", 1)
    starts = _STARTS.get(backbone.device.type, _STARTS_ON_ACCELERATOR) / width**2
    return round(_WEIGHTS * (1 + trained / max(1, layers)) + starts)


def row_lengths(part: Part) -> list[int]:
    """Real tokens of every row, its target included: B lengths."""
    lengths = part.features["attention_mask"].sum(1).tolist()
    if part.targets is None:
        return lengths
    return [length + len(target) for length, target in zip(lengths, part.targets, strict=True)]


def sorted_by_length(lengths: list[int]) -> list[int]:
    """Row numbers, the shortest row first."""
    return sorted(range(len(lengths)), key=lambda row: lengths[row])


def best_split(lengths: list[int], cost: int) -> list[list[int]]:
    """Groups of rows of similar length, so that the fewest positions are computed; each group costs `cost` more.

    Row numbers by group, the group of the shortest rows first. Numbers ascend within a group, so a single group is the
    batch as it was.
    """
    order = sorted_by_length(lengths)
    least = np.zeros(len(order) + 1)  # least[n]: positions and costs of the best split of the first n rows
    begins = [0]  # begins[n]: where the last group of that split begins
    for end, row in enumerate(order, 1):
        # If the last group holds the sorted rows from `begin` on, all of them are padded to the longest, `row`.
        totals = least[:end] + (end - np.arange(end)) * lengths[row] + cost
        begins.append(int(totals.argmin()))
        least[end] = totals[begins[-1]]
    groups, end = [], len(order)
    while end:  # back from the last group to the first
        groups.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return groups[::-1] or [[]]


def split_by_length(column: Part, media_tokens: dict[str, int], cost: int) -> list[Part]:
    """A column in parts of similar length, or whole where that saves nothing; `cost` is from `call_cost`."""
    lengths = row_lengths(column)
    groups = best_split(lengths, cost)
    while column.targets is not None and len(groups) > _MAX_PARTS_WITH_TARGETS:
        cost *= 2
        groups = best_split(lengths, cost)
    if len(groups) == 1:
        return [column]
    try:
        offsets = row_offsets(column.features, media_tokens)
    except ValueError:  # a processor whose media can't be told apart by rows: slower, not wrong
        return [column]
    return [take_rows(column, rows, offsets) for rows in groups]


def unsort(parts: list[Part], values: list[Tensor]) -> Tensor:
    """Join the results (b, ...) of all parts to (B, ...), in the order of the column's rows."""
    if len(parts) == 1:
        return values[0]
    rows = [row for part in parts for row in part.rows or []]
    return torch.cat(values)[torch.tensor(rows, device=values[0].device).argsort()]


# --- which entries belong to a row ----------------------------------------------------------------------------------


def row_offsets(features: dict[str, Any], media_tokens: dict[str, int]) -> dict[str, list[int]]:
    """For every tensor, the place where each row's entries begin: row i owns `value[offsets[i]:offsets[i + 1]]`.

    Features that are no tensors, or another column's, have none. `media_tokens`: ids of the placeholder tokens by
    kind. A `ValueError` if it can't be told which rows a media tensor belongs to.
    """
    batch_size = len(features["input_ids"])
    sample_first = _sample_first(features)
    # sentence-transformers' Trainer takes a column's features by their prefix: the column `negative` also gets those
    # of `negative_1`, as `1_input_ids`, `1_pixel_values` and so on. No model reads them.
    foreign = tuple(key.removesuffix("input_ids") for key in features if key.endswith("_input_ids"))
    offsets = {}
    for key, value in features.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or key.startswith(foreign):
            continue
        counts = [1] * batch_size
        # What has not one entry for each row is about media too, whatever its name.
        if (is_media(key) or len(value) != batch_size) and not sample_first:
            if key.startswith("batch_num_"):  # LLaVA: one number for each sample that has images
                counts = [int(has) for has in _placeholders(features, _kind(key), media_tokens).any(1).tolist()]
            else:
                counts = _media_counts(key, value, features, media_tokens)
        offsets[key] = [0, *accumulate(counts)]
    return offsets


def _sample_first(features: dict[str, Any]) -> bool:
    return any(getattr(features.get(key), "ndim", None) == axes for key, axes in _SAMPLE_FIRST.items())


def is_media(key: str) -> bool:
    """Whether a feature holds media or facts about media, and not one entry per row of text."""
    return any(word in key for word in _MEDIA_WORDS) and not key.endswith(("_per_sample", "token_type_ids"))


def _kind(key: str) -> str:
    if "video" in key or "second_per_grid" in key:
        return "video"
    return "audio" if "audio" in key or "feature" in key else "image"


def _placeholders(features: dict[str, Any], kind: str, media_tokens: dict[str, int]) -> Tensor:
    """(B, T): positions of a kind's placeholder token, or of the image placeholder if the kind has none."""
    token = media_tokens.get(kind, media_tokens.get("image"))
    ids = features["input_ids"]
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token


def _media_counts(key: str, value: Tensor, features: dict[str, Any], media_tokens: dict[str, int]) -> list[int]:
    """How many entries along the first axis of a media tensor belong to each row."""
    # 1. sentence-transformers counted the media of every row. Where entries are patches, the grid tells how many each
    #    medium has.
    kind = _kind(key)
    given = features.get(_COUNTS.get(kind, ""))
    grid = features.get(_GRIDS.get(key, ""))
    if given is not None and grid is not None:
        patches = [0, *accumulate(grid.prod(1).tolist())]
        ends = [0, *accumulate(given.tolist())]
        return [patches[end] - patches[start] for start, end in zip(ends, ends[1:], strict=False)]
    if given is not None and sum(given.tolist()) == len(value):
        return given.tolist()
    # 2. By the runs of placeholders in a row, if there are as many as entries. Either no run has several entries or no
    # entry has several runs, so as many means one each.
    places = _placeholders(features, kind, media_tokens)
    runs = (places[:, 0] + (places[:, 1:] & ~places[:, :-1]).sum(1)).tolist()
    if sum(runs) == len(value):
        return runs
    # 3. By the placeholders of a row, if every entry fills equally many: tiles, frames, equal videos.
    tokens = places.sum(1).tolist()  # (B,)
    each, rest = divmod(sum(tokens), max(1, len(value)))
    if each and not rest and not any(count % each for count in tokens):
        return [count // each for count in tokens]
    raise ValueError(
        f"a batch can be split only if every media entry can be given to its row, but {key} has {len(value)} entries "
        f"for rows with {tokens} placeholder tokens. Use BTokLoss (no mini-batches) for this backbone."
    )


def take_rows(column: Part, rows: list[int], offsets: dict[str, list[int]]) -> Part:
    """Some rows of a column, in this order, without the positions that are padding in all of them.

    A feature without offsets is handed on as it is; media tensors without an entry in these rows are left out.
    """
    features = column.features
    shape = features["input_ids"].shape
    used = features["attention_mask"][rows].any(0).tolist()
    first, last = (used.index(True), shape[1] - used[::-1].index(True)) if any(used) else (0, shape[1])
    # Processors that pad images per sample give rows without any one empty image, which would be taken for real.
    padded_per_sample = _sample_first(features)
    taken = {}
    for key, value in features.items():
        if key not in offsets:
            taken[key] = value
            continue
        if padded_per_sample and is_media(key) and not value[rows].any():
            continue
        entries = _entries(value, rows, offsets[key])
        if value.ndim >= 2 and value.shape[:2] == shape:
            entries = entries[:, first:last]
        if len(entries):
            taken[key] = entries
    targets = None if column.targets is None else [column.targets[row] for row in rows]
    return Part(taken, targets if targets and any(map(len, targets)) else None, rows)


def _entries(value: Tensor, rows: list[int], offsets: list[int]) -> Tensor:
    """The entries of some rows along the first axis; a view where the rows stand one after the other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return value[offsets[rows[0]] : offsets[rows[-1] + 1]]
    if offsets == list(range(len(offsets))):  # one entry per row
        return value[rows]
    return torch.cat([value[offsets[row] : offsets[row + 1]] for row in rows])
