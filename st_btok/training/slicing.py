"""Rows of a column's features: which part of every tensor belongs to which row.

Token tensors have one row per sample, media tensors often do not: images of a batch are stacked one after the other,
per image (LLaVA, Gemma), per tile (InternVL) or per patch (Qwen-VL). sentence-transformers slices the first and the
last kind by their counts; here the placeholder tokens in the rows decide wherever no counts are given.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_COUNTS = {"image": "num_images_per_sample", "video": "num_videos_per_sample"}
# Processors that emit one of these pad the images of every sample to one number: sample first, then image.
_SAMPLE_FIRST = ("pixel_attention_mask", "aspect_ratio_ids")
_MEDIA_WORDS = ("pixel", "image", "video", "audio", "input_features", "feature_attention_mask", "second_per_grid")


def row_offsets(features: dict[str, Any], media_tokens: dict[str, int]) -> dict[str, list[int]]:
    """For every tensor, where the part of each row starts: row i owns `value[offsets[i]:offsets[i + 1]]`.

    Args:
        features: Features of B rows.
        media_tokens: Ids of the placeholder tokens by kind: `image`, `video`, `audio`.

    Returns:
        B + 1 offsets along the first axis, by key.

    Raises:
        ValueError: If it can't be told which rows a media tensor belongs to.
    """
    batch_size = len(features["input_ids"])
    sample_first = any(key in features for key in _SAMPLE_FIRST)
    offsets = {}
    for key, value in features.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        counts = [1] * batch_size
        if is_media(key):
            present = _placeholders(features, _kind(key), media_tokens).any(1).tolist()
            if sample_first:
                counts = [1] * batch_size
            elif key.startswith("batch_num_"):  # LLaVA: one number for each sample that has images
                counts = [int(has) for has in present]
            else:
                counts = _media_counts(key, value, features, media_tokens)
        offsets[key] = [0, *accumulate(counts)]
    return offsets


def is_media(key: str) -> bool:
    """Whether a feature holds media or facts about media, and not one entry per row of text."""
    return any(word in key for word in _MEDIA_WORDS) and not key.endswith(("_per_sample", "token_type_ids"))


def _kind(key: str) -> str:
    if "video" in key or "second_per_grid" in key:
        return "video"
    return "audio" if "audio" in key or "feature" in key else "image"


def _placeholders(features: dict[str, Any], kind: str, media_tokens: dict[str, int]) -> Tensor:
    """(B, T): where a row has the placeholder of this kind; of images, where the kind has none of its own."""
    token = media_tokens.get(kind, media_tokens.get("image"))
    ids = features["input_ids"]
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token


def _media_counts(key: str, value: Tensor, features: dict[str, Any], media_tokens: dict[str, int]) -> list[int]:
    """How many entries along the first axis of a media tensor belong to each row."""
    kind = _kind(key)
    given = features.get(_COUNTS.get(kind, ""))
    grid = features.get(_GRIDS.get(key, ""))
    if given is not None and grid is not None:
        patches = [0, *accumulate(grid.prod(1).tolist())]
        ends = [0, *accumulate(given.tolist())]
        return [patches[end] - patches[start] for start, end in zip(ends, ends[1:], strict=False)]
    if given is not None and int(given.sum()) == len(value):
        return given.tolist()
    places = _placeholders(features, kind, media_tokens)
    tokens = places.sum(1)  # (B,)
    each, rest = divmod(int(tokens.sum()), max(1, len(value)))
    if each and not rest and not (tokens % each).any():
        return (tokens // each).tolist()  # every entry fills equally many places: tiles, frames, equal videos
    runs = places[:, 0] + (places[:, 1:] & ~places[:, :-1]).sum(1)
    if int(runs.sum()) == len(value):
        return runs.tolist()
    raise ValueError(
        f"a batch can be split only if every media entry can be given to its row, but {key} has {len(value)} entries "
        f"for rows with {tokens.tolist()} placeholder tokens. Use BTokLoss (no mini-batches) for this backbone."
    )


def take_rows(features: dict[str, Any], rows: list[int], offsets: dict[str, list[int]]) -> dict[str, Any]:
    """The features of some rows, without the columns that are padding in all of them.

    Args:
        features: Features of B rows.
        rows: Which rows, in which order; at least one.
        offsets: From `row_offsets`.

    Returns:
        New features; media tensors without an entry in these rows are left out.
    """
    shape = features["input_ids"].shape
    used = features["attention_mask"][rows].bool().any(0).nonzero()
    first, last = (int(used.min()), int(used.max()) + 1) if len(used) else (0, shape[1])
    result = {}
    # Processors that pad images per sample give rows without any one empty image, which would be taken for real.
    padded_per_sample = any(name in features for name in _SAMPLE_FIRST)
    idle = {key for key in offsets if is_media(key)} if padded_per_sample else set()
    for key, value in features.items():
        if key not in offsets:
            result[key] = value
            continue
        if key in idle and not value[rows].any():
            continue
        part = _entries(value, rows, offsets[key])
        if value.ndim >= 2 and value.shape[:2] == shape:
            part = part[:, first:last]
        if len(part):
            result[key] = part
    return result


def _entries(value: Tensor, rows: list[int], offsets: list[int]) -> Tensor:
    """The entries of some rows along the first axis; a view where the rows stand one after the other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return value[offsets[rows[0]] : offsets[rows[-1] + 1]]
    return torch.cat([value[offsets[row] : offsets[row + 1]] for row in rows])
