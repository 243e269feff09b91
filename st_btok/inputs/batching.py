"""From inputs to batches: features of each row, its length, a cut where it is too long, batches by length.

    inputs -> read by threads, a few ahead -> features of one row -> a window, sorted by length -> batches

sentence-transformers sorts all inputs by one number, characters of texts and pixels of images alike, so a text of
1,000 characters shares a batch with images of 20 tokens. Here rows are sorted by their tokens, one window at a time (a
thousand rows, or 64 MiB of features, whichever comes first). Equal inputs of a window are embedded once. Everything
but the reading runs in one thread: truncation is a setting of the tokenizer, which two threads would change for each
other.

A row is preprocessed alone, so that its true length is known before it gets a batch. Then the token tensors of a batch
are padded to one length and stacked, and its media tensors are concatenated. That is right only for the layouts named
here (one entry per image, tile or patch, as in Qwen, Gemma and InternVL). Processors that pad images within a batch
(SmolVLM, Idefics3, LLaVA-OneVision) or sounds (Qwen2.5-Omni) return other keys. Such rows keep their input, and the
processor is called again with all inputs of a batch.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from torch import Tensor
from torch.nn import functional as F

from st_btok.model_parts import CONTENT_KEYS
from st_btok.truncation import TooLongError, num_tokens, truncate_to_limit

BATCH_TOKENS = 4096  # padded tokens of a batch
WINDOW_ROWS, WINDOW_BYTES = 1024, 2**26
READERS = 4  # threads that decode media
_TEXTS = 64  # texts that are tokenized together: one call of the processor costs as much as ten short texts
_WASTE = 0.05  # share of a batch's tokens that may be padding; beyond it a shorter row starts the next batch
NO_LIMIT = 2**31 - 1
# One entry per token. Everything but the ids is 0 on padding.
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# For losses that split a batch; no model reads them.
_TRAINING = ("num_images_per_sample", "num_videos_per_sample", *CONTENT_KEYS)
_FIXED = ("modality", "prompt_length")


@dataclass
class Row:
    """An input on its way to a batch."""

    numbers: list[int]  # its row number, and those of equal inputs
    value: Any = None  # the input, decoded; dropped once the features hold all of it
    key: Any = None  # its `content_hash`
    features: dict[str, Any] | None = None  # None before preprocessing, and where only the processor can make a batch
    length: int = 0  # tokens
    reason: str = ""  # why it can't be embedded; empty for good rows

    def refuse(self, reason: str) -> None:
        """Make it a bad row."""
        self.reason, self.value = reason, None


@dataclass(frozen=True)
class Batch:
    """Rows that run together; with their features, where only the processor could make those."""

    rows: list[Row]
    features: dict[str, Any] | None = None


@dataclass(frozen=True)
class Batcher:
    """Makes batches for the model that will embed them."""

    model: SentenceTransformer
    read: Callable[[Any], Any]  # checks and decodes one input; a ValueError says why it is bad
    options: dict[str, Any] = field(default_factory=dict)  # arguments of `model.preprocess`, such as the prompt
    last_token: int | None = None  # id of the last BTok, in which every input must end; None for models without BToks
    limit: int | None = None  # tokens that an input with media is cut to; None leaves it to the model, as for texts
    whole: dict[str, Any] | None = None  # `processing_kwargs` that lift every limit of an input's length
    batch_tokens: int = BATCH_TOKENS  # padded tokens of a batch, at most; a longer row runs alone
    batch_rows: int | None = None  # rows of a batch, at most

    # --- rows to windows ---------------------------------------------------------------------------------------------

    def batches(self, items: Iterable[tuple[int, Any]]) -> Iterator[tuple[list[Row], list[Batch]]]:
        """Read, preprocess and sort numbered inputs; yields the bad rows and the batches of each window."""
        for window in self._windows(items):
            bad = [row for row in window if row.reason]
            yield bad, list(self._batches([row for row in window if not row.reason]))

    def features(self, batch: Batch) -> dict[str, Any]:
        """The features of a batch, on the CPU."""
        if batch.features is not None:
            return batch.features
        tokenizer = self.model.tokenizer
        pad, side = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "padding_side", "right")
        return _collate([row.features for row in batch.rows if row.features is not None], pad or 0, side)

    def _windows(self, items: Iterable[tuple[int, Any]]) -> Iterator[list[Row]]:
        """Preprocessed rows, a window at a time; an input that equals an earlier one joins that one's row.

        A row with media is preprocessed at once. Texts wait until a call of the tokenizer is worth it.
        """
        window: list[Row] = []
        texts: list[Row] = []
        known: dict[Any, Row] = {}
        size = 0
        for row in self._read_ahead(items):
            if not row.reason and (same := known.setdefault(row.key, row)) is not row:
                same.numbers += row.numbers
                continue
            window.append(row)
            if not row.reason and not media_of(row.value):
                texts.append(row)
            elif not row.reason:
                self._preprocess([row])
                size += num_bytes(row)
            full = len(window) >= WINDOW_ROWS or size >= WINDOW_BYTES
            if full or len(texts) >= _TEXTS:
                self._preprocess_texts(texts)
                texts = []
            if full:
                yield window
                known.clear()  # the vectors of these rows are handed out, so a later equal row can't join them
                window, size = [], 0
        self._preprocess_texts(texts)
        if window:
            yield window

    def _read_ahead(self, items: Iterable[tuple[int, Any]]) -> Iterator[Row]:
        """Rows in their order. Inputs that may hold media are read by threads."""
        under_way: deque[Row | Future[Row]] = deque()
        waiting = 0
        with ThreadPoolExecutor(READERS) as pool:
            for number, value in items:
                is_quick = _is_quick(value)
                under_way.append(self._row(number, value) if is_quick else pool.submit(self._row, number, value))
                waiting += not is_quick
                while waiting > READERS or len(under_way) > _TEXTS:
                    first = under_way.popleft()
                    waiting -= isinstance(first, Future)
                    yield first.result() if isinstance(first, Future) else first
            for row in under_way:
                yield row.result() if isinstance(row, Future) else row

    def _row(self, number: int, value: Any) -> Row:
        """Read one input. Where memory does not suffice, the row is bad too: its medium is too large."""
        try:
            found = self.read(value)
            return Row([number], found, content_hash(found))
        except (ValueError, MemoryError) as error:
            return Row([number], reason=str(error) or type(error).__name__)

    # --- rows to features --------------------------------------------------------------------------------------------

    def _preprocess_texts(self, rows: Sequence[Row]) -> None:
        """Preprocess texts together. Conversations need a call of their own, as sentence-transformers expects."""
        for is_talk in (False, True):
            if chosen := [row for row in rows if isinstance(row.value, list) == is_talk]:
                self._preprocess(chosen)

    def _preprocess(self, rows: Sequence[Row]) -> None:
        """Give rows their features and lengths: several texts, or one row with media."""
        reason = ""
        features: dict[str, Any] = {}
        try:
            features = self._features(rows)
        except TooLongError as error:
            reason = str(error)
        except Exception as error:  # what processors raise differs by family
            reason = f"the model's processor refuses it: {str(error) or type(error).__name__}"
        can_collate = not reason and _can_collate(features)
        if len(rows) > 1 and not can_collate:
            for row in rows:  # one by one: to find the bad row, or because these features can't be padded later
                self._preprocess([row])
        elif reason:
            rows[0].refuse(reason)
        elif len(rows) == 1 and self.last_token is not None and last_token(features) != self.last_token:
            # Without its BToks a `mean` model would answer with the zero vector.
            rows[0].refuse(
                f"an input must end in its bottleneck tokens, but they are cut off and {num_tokens(features)} tokens "
                "are left of this one. Raise model.max_seq_length"
            )
        elif not can_collate:
            rows[0].length = num_tokens(features)
        else:
            for row, own in zip(rows, _cut_rows(features) if len(rows) > 1 else [features], strict=True):
                row.features, row.length, row.value = own, num_tokens(own), None

    def _features(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Features of several texts, or of one row with media, whose text is cut to the limit."""
        values = [row.value for row in rows]
        if self.limit is None or not media_of(values[0]):
            return dict(self.model.preprocess(values, **self.options))
        rows[0].value, features = truncate_to_limit(
            values[0], lambda value: self._of_known_length([value]), self.limit, self.model.tokenizer
        )
        return features

    def _of_known_length(self, values: Sequence[Any]) -> dict[str, Any]:
        """Features of inputs that are short enough already, or are about to be measured."""
        whole = self.limit is not None and any(map(media_of, values))
        options = {**self.options, **({"processing_kwargs": self.whole} if whole else {})}
        return dict(self.model.preprocess(values, **options))

    # --- features to batches -----------------------------------------------------------------------------------------

    def _batches(self, window: Sequence[Row]) -> Iterator[Batch]:
        """Batches of rows that can run together, the longest rows first."""
        groups: dict[Any, list[Row]] = {}
        for row, key in zip(window, self._group_keys(window), strict=True):
            groups.setdefault(key, []).append(row)
        for group in groups.values():
            group.sort(key=lambda row: -row.length)
            batch: list[Row] = []
            waste = 0
            for row in group:
                longest = batch[0].length if batch else row.length
                padded = longest * (len(batch) + 1)
                waste += longest - row.length
                too_many = padded > self.batch_tokens or len(batch) == self.batch_rows
                # In a small batch the call costs more than padding, so some padding is always allowed.
                too_loose = waste > max(_WASTE * padded, self.batch_tokens / 32)
                if batch and (too_many or too_loose):
                    yield self._batch(batch)
                    batch, waste = [], 0
                batch.append(row)
            yield self._batch(batch)

    def _group_keys(self, rows: Sequence[Row]) -> list[Any]:
        """A key for every row; rows with equal keys can share a batch."""
        shapes: dict[str, set[Any]] = {key: set() for key in _MEDIA}
        for row in rows:
            for key, value in (row.features or {}).items():
                if key in shapes and isinstance(value, Tensor):
                    shapes[key].add(value.shape[1:])
        # Rows of one modality share batches; where media of one kind differ in shape, only those of equal shapes do.
        varying = [key for key in _MEDIA if len(shapes[key]) > 1]
        keys: list[Any] = []
        for row in rows:
            if row.features is None:
                keys.append(self._input_key(row.value))
            else:
                own = row.features
                entries = [(key, own[key].shape[1:]) for key in varying if key in own]
                keys.append((str(own.get("modality")), own.get("prompt_length"), *entries))
        return keys

    def _input_key(self, value: Any) -> Any:
        """A key; one call of the processor can take all inputs with equal keys, in every family."""
        if "message" not in self.model.modalities:
            return infer_modality(value)
        media = media_of(value)
        # Measured: beside a longer video, the embedding of a shorter one moves by 0.1 on SmolVLM, and LLaVA-OneVision
        # and InternVL raise.
        frames = {len(item["array"] if isinstance(item, dict) else item) for kind, item in media if kind == "video"}
        rates = {item["sampling_rate"] for kind, item in media if kind == "audio" and isinstance(item, dict)}
        return bool(media), isinstance(value, list), tuple(sorted(frames)), tuple(sorted(rates))

    def _batch(self, rows: list[Row]) -> Batch:
        if rows[0].features is not None:
            return Batch(rows)
        features = self._of_known_length([row.value for row in rows])
        for row in rows:
            row.value = None
        return Batch(rows, features)


def _is_quick(value: Any) -> bool:
    """Whether an input is certainly text, so that reading it costs less than handing it to a thread."""
    if isinstance(value, dict):
        return value.keys() == {"text"}
    return isinstance(value, str) and "." not in value[-8:] and not value.startswith(("data:", "http"))


def media_of(value: Any) -> list[tuple[str, Any]]:
    """Kind and value of every medium of a decoded input, in order; none for texts and conversations of texts."""
    if isinstance(value, str):
        return []
    if isinstance(value, list):  # a conversation
        parts = chain.from_iterable(turn["content"] for turn in value if isinstance(turn["content"], list))
        return [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]
    if not isinstance(value, dict) or "array" in value:
        return [(str(infer_modality(value)), value)]
    named = ((kind, items if isinstance(items, list) else [items]) for kind, items in value.items() if kind != "text")
    return [(kind, item) for kind, items in named for item in items]


def content_hash(value: Any) -> Any:
    """A key that is equal for equal inputs. Media are compared by their values, whatever object or file held them."""
    if isinstance(value, Image.Image):
        return Image.Image, value.mode, value.size, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, np.ndarray):
        return np.ndarray, value.dtype.str, value.shape, hashlib.sha256(np.ascontiguousarray(value).data).digest()
    if isinstance(value, dict):  # in the user's order: media before and behind a text are different inputs
        return dict, tuple((str(key), content_hash(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return list, tuple(map(content_hash, value))
    return type(value), value


# --- batches from the features of single rows, without another call of the processor --------------------------------


def _can_collate(features: dict[str, Any]) -> bool:
    """Whether `_collate` knows these features: every key is known, and token tensors have the shape of the ids."""
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
        return False
    if features.keys() - {*_TOKENS, *_MEDIA, *_TRAINING, *_FIXED}:
        return False
    return all(features[key].shape == ids.shape for key in _TOKENS if key in features)


def _cut_rows(features: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a batch of texts, each without its padding."""
    rows = []
    for index, mask in enumerate(features["attention_mask"]):
        used = mask.nonzero()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        row = {key: features[key] for key in _FIXED if key in features}
        row |= {key: features[key][index : index + 1, first:last] for key in _TOKENS if key in features}
        rows.append(row)
    return rows


def _collate(rows: Sequence[dict[str, Any]], pad_token_id: int, padding_side: str) -> dict[str, Any]:
    """A batch from features of one row each, as `preprocess` gives it."""
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {key: rows[0][key] for key in _FIXED if key in rows[0]}
    for key in _TOKENS:
        # A row without media can lack the types that rows with media have: all of its tokens are text, type 0.
        if any(key in row for row in rows):
            tensors = [row[key] if key in row else torch.zeros_like(row["input_ids"]) for row in rows]
            value = pad_token_id if key == "input_ids" else 0
            batch[key] = torch.cat([_padded(tensor, length, value, padding_side) for tensor in tensors])
    for key in _MEDIA:
        # Rows without this medium have no entries. The media of all rows are concatenated, and the model finds each
        # row's own by the placeholders among its token ids.
        parts = [row[key] for row in rows if key in row]
        if parts and isinstance(parts[0], Tensor):
            batch[key] = torch.cat(parts)
        elif parts:
            batch[key] = list(chain.from_iterable(parts))
    return batch


def _padded(tensor: Tensor, length: int, value: int, side: str) -> Tensor:
    missing = length - tensor.shape[1]
    return F.pad(tensor, (missing, 0) if side == "left" else (0, missing), value=value) if missing else tensor


def num_bytes(row: Row) -> int:
    """Memory of a row's features, in bytes; of features that are made with its batch, three floats for each pixel."""
    if row.features is not None:
        return sum(value.nbytes for value in row.features.values() if isinstance(value, Tensor))
    total = 0
    for _, item in [] if row.reason else media_of(row.value):
        array = item["array"] if isinstance(item, dict) else item
        total += 12 * array.width * array.height if isinstance(array, Image.Image) else 4 * getattr(array, "nbytes", 0)
    return total


def last_token(features: dict[str, Any]) -> int | None:
    """Id of the last real token of one row; None where it has no tokens."""
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or not mask.any():
        return None
    return int(ids[mask.bool()][-1])
