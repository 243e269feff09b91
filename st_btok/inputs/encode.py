"""Embedding lists of untidy inputs: every row is checked before its batch runs, and bad ones can be skipped.

`SentenceTransformer.encode` passes rows on as they come: measured with version 6.2, a missing image file is embedded
as the text of its path, NaN pixels give NaN embeddings, an empty frame list is embedded as nothing, a URL is fetched,
and one truncated file ends the whole call with an error that names no row. The checked path refuses or repairs these,
for any SentenceTransformer, with BToks or without. Batches are those of `batching.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings
from torch import Tensor
from tqdm.auto import tqdm

from st_btok.inputs.reader import InputReader, reader_for
from st_btok.inputs.vectors import encode_rows

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
_SHOWN = 10  # bad rows that one error lists


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
    background: str | None = None,
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
        background: Colour to lay transparent images over, such as `"white"`. Default: drop the transparency, as
            plain `encode` does, so that hidden colours show.

    Returns:
        The inputs that can be encoded, their row numbers, and what was skipped.

    Raises:
        ImportError: If a video file is given and PyAV is missing.
        ValueError: If a row is bad under `on_error="raise"`, or an argument has an unknown value.
    """
    _check_on_error(on_error)
    reader = reader_for(
        model, allow_urls=allow_urls, num_frames=num_frames, max_pixels=max_pixels, background=background
    )
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
        ValueError: If a row is bad under `on_error="raise"`.
    """
    kept, kept_rows, skipped = [], [], []
    for row, value in zip(rows, inputs, strict=True):
        try:
            kept.append(reader.read(value))
            kept_rows.append(row)
        except (ValueError, MemoryError) as error:
            skipped.append(SkippedInput(row, str(error) or type(error).__name__))
    if skipped and on_error == "raise":
        raise bad_rows(skipped)
    return CheckedInputs(kept, kept_rows, skipped)


def _check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}.')


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
    allow_urls: bool = False,
    num_frames: int | None = None,
    max_pixels: int | None = None,
    background: str | None = None,
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32",
    show_progress_bar: bool | None = None,
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    **encode_kwargs: Any,
) -> CheckedEmbeddings:
    """Embed inputs, each checked before its batch runs; rows, order and vectors are those of `encode`.

    A video is used whole (or as `num_frames` says): processors choose no frames of their own here.

    Args:
        model: Any SentenceTransformer.
        inputs: What `checked_inputs` takes.
        on_error: See `checked_inputs`. Under `"raise"`, all rows are looked at before the first one is decoded; a file
            that opens but can't be decoded is found when its window is due. Under `"skip"` nothing but bad rows is
            lost.
        allow_urls: See `checked_inputs`.
        num_frames: See `checked_inputs`.
        max_pixels: See `checked_inputs`.
        background: See `checked_inputs`.
        precision: See `encode`; the ranges for `int8` and `uint8` are those of all kept rows.
        show_progress_bar: Rows done so far. Default: where the log level is INFO, as `encode` does.
        convert_to_numpy: See `encode`.
        convert_to_tensor: See `encode`.
        **encode_kwargs: For `encode_rows`: `task`, `prompt`, `truncate_dim`, `batch_tokens`, ...

    Returns:
        The embeddings, the row number of each, and the skipped rows with reasons.

    Raises:
        ImportError: If a video file is given and PyAV is missing.
        ValueError: If a row is bad under `on_error="raise"`, or an argument has an unknown value.
    """
    everything = as_rows(inputs, model)
    media: dict[str, Any] = {
        "allow_urls": allow_urls,
        "num_frames": num_frames,
        "max_pixels": max_pixels,
        "background": background,
    }
    found = encode_rows(model, everything, **media, **encode_kwargs)
    _check_on_error(on_error)
    if on_error == "raise":
        check_rows(everything, range(len(everything)), reader_for(model, **media, decode=False), on_error)
    if show_progress_bar is None:
        show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    pooled = encode_kwargs.get("output_value", "sentence_embedding") == "sentence_embedding"
    good: dict[int, Any] = {}
    matrix: Any = None  # (N, D): a tensor of its own for each row would take several times its numbers
    bad: list[SkippedInput] = []
    with tqdm(total=len(everything), desc="Rows", unit="row", disable=not show_progress_bar) as bar:
        for done in found:
            bar.update()
            if done.reason:
                bad.append(SkippedInput(done.row, done.reason))
            elif pooled:
                matrix = done.embedding.new_empty(len(everything), len(done.embedding)) if matrix is None else matrix
                matrix[done.row] = done.embedding
                good[done.row] = None
            else:
                good[done.row] = done.embedding
            if bad and on_error == "raise":
                raise bad_rows(bad)
    rows = sorted(good)
    embeddings: Any = [good[row] for row in rows]
    if pooled:
        kept = matrix if not bad else None if matrix is None else matrix[rows]
        embeddings = _as_asked(kept, precision, convert_to_numpy and not convert_to_tensor, convert_to_tensor)
    return CheckedEmbeddings(embeddings, rows, sorted(bad, key=lambda one: one.row))


def _as_asked(vectors: Tensor | None, precision: Any, as_array: bool, as_tensor: bool) -> Any:
    """The types that `encode` returns."""
    if vectors is None:
        return np.array([]) if as_array else torch.tensor([]) if as_tensor else []
    result: Any = vectors
    if precision != "float32":
        result = quantize_embeddings(result, precision=precision)
    if as_tensor:
        return torch.as_tensor(result)
    if as_array:
        return result if isinstance(result, np.ndarray) else result.float().cpu().numpy()
    return list(torch.as_tensor(result))
