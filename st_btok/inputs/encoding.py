"""Embedding long lists of untidy inputs: every row is checked before its batch runs, and bad ones can be skipped.

`SentenceTransformer.encode` passes rows on as they come: measured with version 6.2, a missing image file is embedded
as the text of its path, NaN pixels give NaN embeddings, an empty frame list is embedded as nothing, a URL is fetched,
and one truncated file ends the whole call with an error that names no row. The checked path refuses or repairs these,
for any SentenceTransformer, with BToks or without. It also encodes apart what one batch can't hold: conversations
beside other inputs, whose media sentence-transformers loses; videos beside images (SmolVLM) or beside videos of
another length; sampling rates; and, for models without a chat template, different modalities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.util import quantize_embeddings
from torch import Tensor

from st_btok.inputs.reader import InputReader, reader_for

OnError = Literal["raise", "skip"]
_SHOWN = 10  # bad rows that one error lists
# What is decoded at a time: so many batches, enough for sentence-transformers to sort by length, or so many pixels
# (0.8 GB), whatever comes first.
_CHUNK_BATCHES, _CHUNK_PIXELS = 8, 2**28


@dataclass(frozen=True)
class SkippedInput:
    """A row that was left out: its number in the inputs, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class CheckedInputs:
    """Inputs that a model can take.

    Attributes:
        inputs: The normalised inputs, decoded, in their order; ready for `encode`.
        rows: Their numbers in the inputs that were checked.
        skipped: The rows that were left out; empty under `on_error="raise"`.
    """

    inputs: list[Any]
    rows: list[int]
    skipped: list[SkippedInput]


@dataclass(frozen=True)
class CheckedEmbeddings:
    """What `encode_checked` made.

    Attributes:
        embeddings: What `encode` returns for the kept rows, in their order: (kept, D) float32 by default.
        rows: Row numbers of the kept inputs, ascending.
        skipped: The rows that were left out; empty under `on_error="raise"`.
    """

    embeddings: Any
    rows: list[int]
    skipped: list[SkippedInput]


def checked_inputs(
    inputs: Sequence[Any],
    model: SentenceTransformer,
    on_error: OnError = "raise",
    *,
    allow_urls: bool = False,
    num_frames: int | None = None,
    max_pixels: int | None = None,
) -> CheckedInputs:
    """Check and decode inputs before a model sees them.

    All media are decoded at once; `encode_checked` goes through long lists piece by piece.

    Args:
        inputs: What `encode` takes, and more: paths as `Path`, bytes and data URIs as media, video files through PyAV.
        model: The model that will embed them.
        on_error: `"raise"` (default): one error that lists the bad rows. `"skip"`: bad rows are left out and listed.
        allow_urls: Fetch URLs of media. Default: refuse them. (Plain `encode` fetches.)
        num_frames: At most this many evenly spaced frames of each video. Default: 8 of a file, all of other videos.
        max_pixels: Shrink images and frames to this area in pixels. Default: the model's own processor decides.

    Returns:
        The inputs that can be encoded, their row numbers, and what was skipped.

    Raises:
        ImportError: If a video file is given and PyAV is missing.
        ValueError: If a row is bad under `on_error="raise"`, or an argument has an unknown value.
    """
    reader = reader_for(model, allow_urls=allow_urls, num_frames=num_frames, max_pixels=max_pixels)
    return check_rows(as_rows(inputs, model), range(len(inputs)), reader, on_error)


def as_rows(inputs: Sequence[Any], model: SentenceTransformer) -> list[Any]:
    """A batch as a list.

    Args:
        inputs: The batch.
        model: The model that will embed it.

    Returns:
        One entry per input.

    Raises:
        ValueError: If it is one input and not a batch.
    """
    if model.is_singular_input(inputs):
        raise ValueError("the checked path takes a batch: put the one input into a list, [input]")
    return list(inputs)


def check_rows(inputs: Sequence[Any], rows: Sequence[int], reader: InputReader, on_error: OnError) -> CheckedInputs:
    """Read rows that have numbers already.

    Args:
        inputs: The inputs.
        rows: The number of each, for errors and results.
        reader: Reads one input.
        on_error: See `checked_inputs`.

    Returns:
        What can be encoded, and what was skipped.

    Raises:
        ValueError: If a row is bad under `on_error="raise"`, or `on_error` is unknown.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}.')
    kept, kept_rows, skipped = [], [], []
    for row, value in zip(rows, inputs, strict=True):
        try:
            kept.append(reader.read(value))
            kept_rows.append(row)
        except ValueError as error:
            skipped.append(SkippedInput(row, str(error)))
    if skipped and on_error == "raise":
        raise bad_rows(skipped)
    return CheckedInputs(kept, kept_rows, skipped)


def bad_rows(skipped: Sequence[SkippedInput]) -> ValueError:
    """One error for all bad rows.

    Args:
        skipped: The bad rows, at least one.

    Returns:
        An error that lists the first ten.
    """
    lines = [f"row {bad.row}: {bad.reason}." for bad in skipped[:_SHOWN]]
    more = [f"... and {len(skipped) - _SHOWN} more."] if len(skipped) > _SHOWN else []
    head = f'inputs that can\'t be encoded: {len(skipped)} (on_error="skip" leaves them out)'
    return ValueError("\n".join([head, *lines, *more]))


def encode_checked(
    model: SentenceTransformer,
    inputs: Sequence[Any],
    on_error: OnError = "raise",
    *,
    task: Literal["query", "document"] | None = None,
    allow_urls: bool = False,
    num_frames: int | None = None,
    max_pixels: int | None = None,
    batch_size: int = 32,
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32",
    **encode_kwargs: Any,
) -> CheckedEmbeddings:
    """Embed inputs, each checked before its batch runs.

    All rows are checked first without decoding files, then up to eight batches at a time are decoded,
    checked and encoded.
    A video is used whole (or as `num_frames` says): processors choose no frames of their own here.

    Args:
        model: Any SentenceTransformer.
        inputs: What `checked_inputs` takes.
        on_error: See `checked_inputs`. Under `"raise"`, a file that opens but can't be decoded is found when its
            batches are due; under `"skip"` nothing but bad rows is lost.
        task: `"query"` or `"document"` use `encode_query` or `encode_document`. Default: `encode`.
        allow_urls: See `checked_inputs`.
        num_frames: See `checked_inputs`.
        max_pixels: See `checked_inputs`.
        batch_size: Inputs in one forward pass, at least 1.
        precision: See `encode`; the ranges for `int8` and `uint8` are those of all kept rows.
        **encode_kwargs: Passed to `encode`.

    Returns:
        The embeddings, the row number of each, and the skipped rows with reasons.

    Raises:
        ImportError: If a video file is given and PyAV is missing.
        ValueError: If a row is bad under `on_error="raise"`, or an argument has an unknown value.
    """
    if task not in (None, "query", "document"):
        raise ValueError(f'task must be "query", "document" or None, got {task!r}.')
    encode = partial(getattr(model, "encode" if task is None else f"encode_{task}"), batch_size=batch_size)
    reader = reader_for(model, allow_urls=allow_urls, num_frames=num_frames, max_pixels=max_pixels)
    everything = as_rows(inputs, model)
    found = check_rows(everything, range(len(everything)), replace(reader, decode=False), on_error)
    texts_only = all(isinstance(value, str) for value in found.inputs)
    size = len(everything) if texts_only else batch_size * _CHUNK_BATCHES
    done = [CheckedEmbeddings(None, [], found.skipped)]
    for checked in _chunks(everything, found.rows, reader, on_error, size):
        done.append(CheckedEmbeddings(None, [], checked.skipped))
        for group in _groups(checked, "message" in reader.modalities):
            done.append(_encode(model, encode, group, on_error, encode_kwargs))
    if not any(part.rows for part in done):
        done.insert(0, CheckedEmbeddings(encode([], **encode_kwargs), [], []))
    result = _in_order(done)
    if precision != "float32" and result.rows:
        result = replace(result, embeddings=quantize_embeddings(result.embeddings, precision=precision))
    return result


def _chunks(
    inputs: list[Any], rows: list[int], reader: InputReader, on_error: OnError, size: int
) -> Iterator[CheckedInputs]:
    """Decode rows until there are enough for one go."""
    chunk, pixels = CheckedInputs([], [], []), 0
    for row in rows:
        one = check_rows([inputs[row]], [row], reader, on_error)
        chunk.inputs.extend(one.inputs)
        chunk.rows.extend(one.rows)
        chunk.skipped.extend(one.skipped)
        pixels += sum(_pixels(item) for value in one.inputs for _, item in _media(value))
        if len(chunk.rows) >= size or pixels >= _CHUNK_PIXELS:
            yield chunk
            chunk, pixels = CheckedInputs([], [], []), 0
    yield chunk


def _pixels(medium: Any) -> int:
    if isinstance(medium, Image.Image):
        return medium.width * medium.height
    frames = medium.get("array") if isinstance(medium, dict) else medium
    return math.prod(frames.shape[:3]) if isinstance(frames, np.ndarray) and frames.ndim == 4 else 0


def _groups(checked: CheckedInputs, has_messages: bool) -> list[CheckedInputs]:
    """Rows that can share a batch."""
    groups: dict[Any, CheckedInputs] = {}
    for row, value in zip(checked.rows, checked.inputs, strict=True):
        group = groups.setdefault(_batch_key(value, has_messages), CheckedInputs([], [], []))
        group.inputs.append(value)
        group.rows.append(row)
    return list(groups.values())


def _batch_key(value: Any, has_messages: bool) -> Any:
    """Equal for inputs that can share a batch on every family."""
    if not has_messages:
        return infer_modality(value)
    media = _media(value)
    # Measured: beside a longer video, SmolVLM misreads a shorter one (0.1), LLaVA-OneVision and InternVL raise.
    frames = {len(item["array"] if isinstance(item, dict) else item) for kind, item in media if kind == "video"}
    rates = {item["sampling_rate"] for kind, item in media if kind == "audio" and isinstance(item, dict)}
    return isinstance(value, list), tuple(sorted(frames)), tuple(sorted(rates))


def _media(value: Any) -> list[tuple[str, Any]]:
    """Every medium of a normalised input, with its kind."""
    if isinstance(value, list):  # a conversation
        contents = [turn["content"] for turn in value if isinstance(turn["content"], list)]
        return [(part["type"], part[part["type"]]) for content in contents for part in content]
    if not isinstance(value, dict) or "array" in value:
        return [(str(infer_modality(value)), value)]
    return [(kind, item) for kind, items in value.items() for item in (items if isinstance(items, list) else [items])]


def _encode(
    model: SentenceTransformer, encode: Any, group: CheckedInputs, on_error: OnError, kwargs: dict[str, Any]
) -> CheckedEmbeddings:
    """Encode a group; rows that the model's own processor refuses, such as media beyond the limit, are bad rows."""
    if "video" in model.modalities:
        own = kwargs.get("processing_kwargs") or {}
        video = {"do_sample_frames": False, **own.get("video", {})}
        kwargs = {**kwargs, "processing_kwargs": {**own, "video": video}}
    try:
        return CheckedEmbeddings(encode(group.inputs, **kwargs), group.rows, [])
    except Exception as error:
        bad = []
        for row, value in zip(group.rows, group.inputs, strict=True):
            try:
                model.preprocess([value], processing_kwargs=kwargs.get("processing_kwargs"))
            except Exception as reason:
                bad.append(SkippedInput(row, f"the model's processor refuses it: {reason}"))
        if not bad:
            raise
        if on_error == "raise":
            raise bad_rows(bad) from error
    lost = {skipped.row for skipped in bad}
    kept = [(row, value) for row, value in zip(group.rows, group.inputs, strict=True) if row not in lost]
    embeddings = encode([value for _, value in kept], **kwargs) if kept else None
    return CheckedEmbeddings(embeddings, [row for row, _ in kept], bad)


def _in_order(done: list[CheckedEmbeddings]) -> CheckedEmbeddings:
    """Parts of any of the types that `encode` returns, put together in ascending row order."""
    skipped = sorted((bad for part in done for bad in part.skipped), key=lambda bad: bad.row)
    parts = [part for part in done if part.rows] or done[:1]
    rows = [row for part in parts for row in part.rows]
    order = np.argsort(rows)
    embeddings: Any
    if isinstance(parts[0].embeddings, np.ndarray):
        embeddings = np.concatenate([part.embeddings for part in parts])
        embeddings = embeddings[order] if rows else embeddings
    elif isinstance(parts[0].embeddings, Tensor):
        embeddings = torch.cat([part.embeddings for part in parts])
        embeddings = embeddings[torch.as_tensor(order)] if rows else embeddings
    else:
        flat = [item for part in parts for item in part.embeddings]
        embeddings = [flat[index] for index in order]
    return CheckedEmbeddings(embeddings, sorted(rows), skipped)
