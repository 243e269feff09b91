"""Features of single rows, put together to a batch without asking the processor again.

A row is preprocessed alone, so that its true length is known before it gets a batch. Its token tensors are padded to
the batch's length and stacked; its media tensors are put one after the other. That is certain only for the layouts
named here (one entry per image, tile or patch, as Qwen, Gemma and InternVL lay them out). Processors that pad images
within a batch (SmolVLM, Idefics3, LLaVA-OneVision) or sounds (Qwen2.5-Omni) use more keys; such rows keep their input,
and the processor makes their batch, once their length has given them one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# One entry per token. Everything but the ids is 0 on padding.
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# Read by sentence-transformers where it cuts a batch into mini-batches of a loss; no model reads them.
_TRAINING = ("num_images_per_sample", "num_videos_per_sample")
_FIXED = ("modality", "prompt_length")


def can_collate(features: dict[str, Any]) -> bool:
    """Whether rows with such features can be put together here.

    Args:
        features: What `preprocess` gave for one row or for several texts.

    Returns:
        False where a key is unknown, or a token tensor has another shape than the ids.
    """
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
        return False
    if features.keys() - {*_TOKENS, *_MEDIA, *_TRAINING, *_FIXED}:
        return False
    return all(features[key].shape == ids.shape for key in _TOKENS if key in features)


def cut_rows(features: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a batch of texts, each without its padding.

    Args:
        features: Features of B texts, for which `can_collate` holds.

    Returns:
        Features of one row each.
    """
    rows = []
    for index, mask in enumerate(features["attention_mask"]):
        used = mask.nonzero()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        row = {key: features[key] for key in _FIXED if key in features}
        row |= {key: features[key][index : index + 1, first:last] for key in _TOKENS if key in features}
        rows.append(row)
    return rows


def signatures(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Equal for rows whose features can share a batch.

    Args:
        rows: Features of one row each.

    Returns:
        For each row, what must be the same in all rows of a batch; the shape of a medium's entries is part of it only
        where it differs among these rows, so that texts and media share batches wherever they can.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {key: set() for key in _MEDIA}
    for row in rows:
        for key in _MEDIA:
            if isinstance(row.get(key), Tensor):
                shapes[key].add(tuple(row[key].shape[1:]))
    varying = [key for key in _MEDIA if len(shapes[key]) > 1]
    found: list[tuple[Any, ...]] = []
    for row in rows:
        entries = [(key, tuple(row[key].shape[1:])) for key in varying if key in row]
        found.append((str(row.get("modality")), row.get("prompt_length"), *entries))
    return found


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int, padding_side: str) -> dict[str, Any]:
    """A batch from rows.

    Args:
        rows: Features of one row each, at least one, with equal `signatures`.
        pad_token_id: Id for the padding of `input_ids`.
        padding_side: `"left"` or `"right"`.

    Returns:
        Features of the batch, as `preprocess` gives them.
    """
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {key: rows[0][key] for key in _FIXED if key in rows[0]}
    for key in _TOKENS:
        # A row without media can lack the types that rows with media have: all of its tokens are text, type 0.
        if any(key in row for row in rows):
            value = pad_token_id if key == "input_ids" else 0
            batch[key] = torch.cat([_padded(row, key, length, value, padding_side) for row in rows])
    for key in _MEDIA:
        # Rows without this medium have no entry: media stand in one line, and the token ids tell whose they are.
        parts = [row[key] for row in rows if key in row]
        if parts and isinstance(parts[0], Tensor):
            batch[key] = torch.cat(parts)
        elif parts:
            batch[key] = list(chain.from_iterable(parts))
    return batch


def _padded(row: dict[str, Any], key: str, length: int, value: int, side: str) -> Tensor:
    ids = row["input_ids"]
    tensor = row[key] if key in row else torch.zeros_like(ids)
    missing = length - ids.shape[1]
    return F.pad(tensor, (missing, 0) if side == "left" else (0, missing), value=value) if missing else tensor


def num_bytes(features: dict[str, Any]) -> int:
    """Memory of features.

    Args:
        features: Any features.

    Returns:
        Bytes of their tensors.
    """
    return sum(value.nbytes for value in features.values() if isinstance(value, Tensor))


def last_token(features: dict[str, Any]) -> int | None:
    """Id of the last token of one row, padding aside.

    Args:
        features: Features of one row.

    Returns:
        The id; None where a row has no tokens.
    """
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or not mask.any():
        return None
    return int(ids[mask.bool()][-1])


def num_tokens(features: dict[str, Any]) -> int:
    """True length of one row.

    Args:
        features: Features of one row.

    Returns:
        Its tokens; 1 where it has none, such as the image of a dual encoder.
    """
    mask, ids = features.get("attention_mask"), features.get("input_ids")
    if isinstance(mask, Tensor):
        return max(1, int(mask.sum()))
    return ids.numel() if isinstance(ids, Tensor) else 1
