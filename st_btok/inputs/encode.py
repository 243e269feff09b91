"""Embedding of untidy inputs: every row is checked before its batch runs, and bad ones can be skipped.

`SentenceTransformer.encode` passes rows on as they come: measured with version 6.2, a missing image file is embedded
as the text of its path, NaN pixels give NaN embeddings, an empty frame list is embedded as nothing, a URL is fetched,
and one truncated file ends the whole call with an error that names no row. The checked path refuses or repairs these,
for any SentenceTransformer, with BToks or without:

    source --fetch--> open file --reader--> images, videos: pixels --batching--> features, batches --> vectors

    result = encode_checked(model, rows)           # a list of any length, its matrix
    for done in encode_rows(model, stream): ...    # a stream, in flat memory
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, quantize_embeddings, truncate_embeddings
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from st_btok.inputs.batching import BATCH_TOKENS, NO_LIMIT, Batcher, last_token
from st_btok.inputs.fetch import MediaOptions
from st_btok.inputs.pdf import PdfPages
from st_btok.inputs.reader import InputReader, reader_for
from st_btok.tokens import btok_ids

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
_SHOWN = 10  # bad rows that one error lists
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first of them that a model has, as in `encode_document`
_END: Any = object()


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


@dataclass(frozen=True)
class EncodedRow:
    """What became of one input.

    Attributes:
        row: Its number in the inputs.
        embedding: (D,) on the model's device, or (T, D) of token embeddings; None for a bad row.
        reason: Why it can't be embedded; empty for good rows.
    """

    row: int
    embedding: Any
    reason: str = ""


def checked_inputs(
    inputs: Iterable[Any], model: SentenceTransformer, on_error: OnError = "raise", **media: Any
) -> CheckedInputs:
    """Check and decode inputs before a model sees them.

    All media are decoded at once; `encode_checked` goes through long lists piece by piece.

    Args:
        inputs: A batch, any iterable, of what `encode` takes, and more: paths as `Path`, bytes and data URIs as media,
            video files through PyAV. A `ValueError` in the place of an input is a bad row with that reason.
        model: The model that will embed them.
        on_error: `"raise"` (default): one error that lists the bad rows. `"skip"`: bad rows are left out and listed.
        **media: How media are read: `allow_urls`, `num_frames`, `max_pixels`, `background`, see `MediaOptions`.

    Returns:
        The inputs that can be encoded, their row numbers, and what was skipped.

    Raises:
        ImportError: If a video file is given and PyAV is missing.
        ValueError: If a row is bad under `on_error="raise"`, or an argument has an unknown value.
    """
    _check_on_error(on_error)
    return check_rows(_numbered(as_batch(inputs, model)), reader_for(model, MediaOptions(**media)), on_error)


def as_batch(inputs: Iterable[Any], model: SentenceTransformer) -> Iterable[Any]:
    """The batch as it was given; a `ValueError` if it is one input and not a batch."""
    if hasattr(inputs, "columns") and hasattr(inputs, "iloc"):
        columns = [str(column) for column in inputs.columns]
        raise ValueError(
            f"the checked path takes a batch, got a table: pass one of its columns {columns}, or its rows"
        )
    is_one = isinstance(inputs, str | bytes | Path | dict | Image.Image) or getattr(inputs, "ndim", 1) != 1
    if isinstance(inputs, list | np.ndarray | Tensor):
        is_one = is_one or model.is_singular_input(inputs)
    if is_one or not isinstance(inputs, Iterable):
        raise ValueError("the checked path takes a batch: put the one input into a list, [input]")
    return inputs


def _numbered(inputs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers; a page of a PDF that can't be drawn is replaced by the error."""
    iterator = iter(inputs)
    for number in count():
        try:
            value = next(iterator)
        except StopIteration:
            return
        except ValueError as error:
            if not isinstance(iterator, PdfPages):  # which goes on behind a bad page
                raise
            value = error
        yield number, value


def check_rows(rows: Iterable[tuple[int, Any]], reader: InputReader, on_error: OnError) -> CheckedInputs:
    """Read numbered rows, and sort out bad ones, or raise one error for all of them; see `checked_inputs`."""
    kept, kept_rows, skipped = [], [], []
    for row, value in rows:
        try:
            kept.append(reader.read(value))
            kept_rows.append(row)
        except (ValueError, MemoryError) as error:
            skipped.append(SkippedInput(row, str(error) or type(error).__name__))
    if skipped and on_error == "raise":
        raise _bad_rows(skipped)
    return CheckedInputs(kept, kept_rows, skipped)


def _check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}.')


def _bad_rows(skipped: Sequence[SkippedInput]) -> ValueError:
    """One error for all bad rows, which lists the first ten."""
    lines = [f"row {bad.row}: {bad.reason}." for bad in skipped[:_SHOWN]]
    more = [f"... and {len(skipped) - _SHOWN} more."] if len(skipped) > _SHOWN else []
    head = f'inputs that can\'t be encoded: {len(skipped)} (on_error="skip" leaves them out)'
    return ValueError("\n".join([head, *lines, *more]))


def encode_checked(
    model: SentenceTransformer,
    inputs: Iterable[Any],
    on_error: OnError = "raise",
    *,
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32",
    show_progress_bar: bool | None = None,
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    **options: Any,
) -> CheckedEmbeddings:
    """Embed inputs, each checked before its batch runs; rows, order and vectors are those of `encode`.

    A video is used whole (or as `num_frames` says): processors choose no frames of their own here.

    Args:
        model: Any SentenceTransformer.
        inputs: What `checked_inputs` takes.
        on_error: See `checked_inputs`. Under `"raise"`, all rows of a list are checked before the first one is
            decoded. A file that opens but can't be decoded, and any bad row of an iterator, is found when its turn
            comes. Under `"skip"` nothing but bad rows is lost.
        precision: See `encode`; the ranges for `int8` and `uint8` are those of all kept rows.
        show_progress_bar: Rows done so far. Default: where the log level is INFO, as `encode` does.
        convert_to_numpy: See `encode`.
        convert_to_tensor: See `encode`.
        **options: For `encode_rows`: those of `MediaOptions`, `task`, `prompt`, `truncate_dim`, `batch_tokens`, ...

    Returns:
        The embeddings, the row number of each, and the skipped rows with reasons.

    Raises:
        ImportError: If a video file is given and PyAV is missing.
        ValueError: If a row is bad under `on_error="raise"`, or an argument has an unknown value.
    """
    _check_on_error(on_error)
    batch = as_batch(inputs, model)
    total = len(batch) if isinstance(batch, Sized) else None
    found = encode_rows(model, batch, **options)
    if on_error == "raise" and total is not None:
        media = MediaOptions(**{key: options[key] for key in _MEDIA_NAMES & options.keys()})
        check_rows(enumerate(batch), reader_for(model, media, decode=False), on_error)
    if show_progress_bar is None:
        show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    pooled = options.get("output_value", "sentence_embedding") == "sentence_embedding"
    good: dict[int, Any] = {}
    matrix: Any = None  # (N, D): a tensor of its own for each row would take several times its numbers
    bad: list[SkippedInput] = []
    for done in tqdm(found, desc="Rows", unit="row", total=total, disable=not show_progress_bar):
        if done.reason:
            bad.append(SkippedInput(done.row, done.reason))
            if on_error == "raise":
                raise _bad_rows(bad)
        elif pooled:
            matrix = _with_row(matrix, done, total)
            good[done.row] = None
        else:
            good[done.row] = done.embedding
    rows = sorted(good)
    embeddings: Any = [good[row] for row in rows]
    if pooled:
        kept = matrix if matrix is None or len(rows) == len(matrix) else matrix[rows]
        embeddings = _as_asked(kept, precision, convert_to_numpy and not convert_to_tensor, convert_to_tensor)
    return CheckedEmbeddings(embeddings, rows, sorted(bad, key=lambda one: one.row))


def _with_row(matrix: Tensor | None, done: EncodedRow, total: int | None) -> Tensor:
    """The matrix with one more row; it doubles its size when it is full."""
    if matrix is None:
        matrix = done.embedding.new_empty(total or 64, len(done.embedding))
    while done.row >= len(matrix):
        matrix = torch.cat([matrix, torch.empty_like(matrix)])
    matrix[done.row] = done.embedding
    return matrix


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


_MEDIA_NAMES = {option.name for option in fields(MediaOptions)}


def encode_rows(
    model: SentenceTransformer,
    inputs: Iterable[Any],
    *,
    task: Literal["query", "document"] | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    batch_size: int | None = None,
    output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    device: str | torch.device | None = None,
    processing_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[EncodedRow]:
    """Embed a stream of inputs of any length in flat memory; bad rows come out with their reason.

    Args:
        model: Any SentenceTransformer.
        inputs: What `checked_inputs` takes; it is read a window ahead.
        task: `"query"` or `"document"`: prompt and route of `encode_query` or `encode_document`. Default: `encode`.
        prompt_name: See `encode`.
        prompt: See `encode`.
        batch_tokens: Padded tokens of a forward pass, at least 1; a longer row runs alone. More suit a GPU.
        batch_size: Rows of a forward pass at most, at least 1. Default: as many as `batch_tokens` allows.
        output_value: See `encode`.
        normalize_embeddings: See `encode`.
        truncate_dim: See `encode`.
        device: See `encode`; one device.
        processing_kwargs: See `encode`.
        **options: How media are read, see `MediaOptions`, and further arguments of the model's `preprocess` and
            `forward`.

    Returns:
        An iterator over all rows; rows of a window come in the order of their batches.

    Raises:
        ValueError: If an argument has an unknown value.
    """
    _check_arguments(task, output_value, batch_tokens, batch_size, device)
    media = MediaOptions(**{key: options.pop(key) for key in _MEDIA_NAMES & options.keys()})
    if "pool" in options:
        raise ValueError(_ONE_DEVICE)
    if unknown := set(options) - set(model.get_model_kwargs()):
        raise ValueError(f"this model's encode does not know {sorted(unknown)}. Leave them out.")
    # 1. Arguments of the model: those of the processor, and the limit of inputs that end in BToks.
    forwarded = {**options, **({"task": task} if task else {})}
    # The reader has chosen the frames of videos, so the processor must take all of them.
    processing = processing_kwargs or {}
    if "video" in model.modalities:
        processing = {**processing, "video": {"do_sample_frames": False, **processing.get("video", {})}}
    end = _last_btok(model)
    limit = None if end is None else _limit(model, processing)
    forwarded["processing_kwargs"] = processing if limit is None else _with_raised_limit(model, processing, limit)
    # 2. From inputs to batches.
    batcher = Batcher(
        model,
        reader_for(model, media).read,
        {"prompt": _prompt(model, task, prompt, prompt_name), **forwarded},
        end,
        limit,
        _without_limit(processing),
        batch_tokens,
        batch_size,
    )
    # 3. From batches to vectors.
    if device is not None:
        model.to(device)
    truncate_dim = model.truncate_dim if truncate_dim is None else truncate_dim
    model.eval()

    def run(features: dict[str, Any]) -> list[Tensor]:
        """One batch, as `encode` treats it."""
        with torch.inference_mode():
            features = batch_to_device(features, model.device)
            out = model(features, **forwarded)
            if output_value == "token_embeddings":
                states, mask = out["token_embeddings"], features.get("attention_mask")
                return list(states) if mask is None else [row[on.bool()] for row, on in zip(states, mask, strict=True)]
            vectors = truncate_embeddings(out["sentence_embedding"], truncate_dim)
            return list(torch.nn.functional.normalize(vectors, p=2, dim=1) if normalize_embeddings else vectors)

    return _encode(as_batch(inputs, model), batcher, run)


_ONE_DEVICE = "one process and one device at a time: for several, run recipes.encode_corpus_ray."


def _check_arguments(task: Any, output_value: Any, batch_tokens: int, batch_size: int | None, device: Any) -> None:
    if task not in (None, "query", "document"):
        raise ValueError(f'task must be "query", "document" or None, got {task!r}.')
    if output_value not in ("sentence_embedding", "token_embeddings"):
        raise ValueError(f"output_value must be sentence_embedding or token_embeddings, got {output_value!r}.")
    if batch_tokens < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"batch_tokens and batch_size must be at least 1, got {batch_tokens} and {batch_size}.")
    if isinstance(device, list):
        raise ValueError(_ONE_DEVICE)


def _encode(inputs: Iterable[Any], batcher: Batcher, run: Any) -> Iterator[EncodedRow]:
    for bad, batches in prefetch(batcher.batches(_numbered(inputs))):
        for row in bad:
            yield from (EncodedRow(number, None, row.reason) for number in row.numbers)
        while batches:
            batch = batches.pop(0)  # so that its memory is free as soon as it is done
            vectors = run(batcher.features(batch))
            for row, vector in zip(batch.rows, vectors, strict=True):
                yield from (EncodedRow(number, vector) for number in row.numbers)
            del batch, vectors


def prefetch(items: Iterable[Any]) -> Iterator[Any]:
    """The same items; a thread makes the next one while the caller uses the one before it."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, iterator, _END)
            yield item


def _prompt(model: SentenceTransformer, task: str | None, prompt: str | None, name: str | None) -> str | None:
    if prompt is not None:
        return prompt
    if name is None:
        names = {"query": ("query",), "document": _DOCUMENT_PROMPTS}.get(task or "", ())
        name = next((name for name in names if name in model.prompts), model.default_prompt_name)
    if name is not None and name not in model.prompts:
        raise ValueError(f"prompt_name must be one of {sorted(model.prompts)}, got {name!r}.")
    return None if name is None else model.prompts[name]


def _last_btok(model: SentenceTransformer) -> int | None:
    """Id of the token that ends every input of a BTok model (with `read_budget` not BTok K); None for other models."""
    tokenizer = getattr(model[0], "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not (ids := btok_ids(tokenizer)):
        return None
    last = last_token(model.preprocess(["a"]))
    return last if last in ids else None


def _limit(model: SentenceTransformer, processing: dict[str, Any]) -> int | None:
    """The limit of a whole input in tokens: the caller's, else `model.max_seq_length`; None if truncation is off."""
    text = processing.get("text", {})
    return None if text.get("truncation", True) is False else text.get("max_length") or model.max_seq_length


def _without_limit(processing: dict[str, Any]) -> dict[str, Any]:
    """`processing_kwargs` under which an input is neither cut nor refused for its length."""
    # The caller's own `max_chars` stays; the saved one does not hold.
    template = {"max_chars": None, **processing.get("chat_template", {}), "max_tokens": None}
    # Not truncation=False, under which transformers warns of every long input.
    text = {**processing.get("text", {}), "truncation": True, "max_length": NO_LIMIT}
    return {**processing, "text": text, "chat_template": template}


def _with_raised_limit(model: SentenceTransformer, processing: dict[str, Any], limit: int) -> dict[str, Any]:
    """`processing_kwargs` for texts under a limit above the saved one, far beyond which the template drops text."""
    saved: Any = getattr(model[0], "processing_kwargs", {}).get("chat_template", {})
    asked = processing.get("chat_template", {})
    if "max_chars" in asked or not saved.get("max_chars") or limit <= saved.get("max_tokens", limit):
        return processing
    chars = math.ceil(saved["max_chars"] / saved["max_tokens"] * limit)
    return {**processing, "chat_template": {**asked, "max_chars": chars}}
