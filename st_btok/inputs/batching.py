"""Batches for long runs: every row preprocessed alone, sorted by its true length, bounded by padded tokens.

    rows -> read by threads, a few ahead -> features of one row -> a window, sorted by length -> batches -> vectors

sentence-transformers sorts by characters against pixels, so a text of 1,000 characters shares a batch with images of
20 tokens; and short pieces of a corpus repeat that. Here a window (a thousand rows, or 64 MiB of features, whatever
comes first) is sorted by tokens. While one window is embedded, a thread prepares the next. Identical inputs of a
window are embedded once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from sentence_transformers import SentenceTransformer

from st_btok.inputs.collate import can_collate, collate, cut_rows, last_token, num_bytes, num_tokens, signatures
from st_btok.inputs.fitting import TooLongError, fit, without_limits
from st_btok.inputs.identity import content_of, identity

BATCH_TOKENS = 4096  # padded tokens of a batch
WINDOW_ROWS, WINDOW_BYTES = 1024, 2**26
READERS = 4  # threads that decode media
_TEXTS = 64  # texts that are tokenized together: one call of the processor costs as much as ten short texts
_WASTE = 0.05  # of a batch's padded tokens, beyond which a shorter row starts the next batch
_END: Any = object()


@dataclass
class Row:
    """An input on its way, and every place in the list that it stands at.

    Attributes:
        numbers: Row numbers; several for identical inputs.
        key: `identity` of the input.
        value: The input, as read; dropped once the features hold all of it.
        content: `content_of` the input, where it holds media: equal pictures in two objects or files are one.
        features: What the model reads; None until preprocessed, or where only the processor can make a batch.
        length: Tokens.
        reason: Why it can't be embedded; empty for good rows.
    """

    numbers: list[int]
    key: Any = None
    value: Any = None
    content: Any = None
    features: dict[str, Any] | None = None
    length: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Preparation:
    """How rows become features.

    Attributes:
        model: The model that will embed them.
        read: Checks and decodes one input; a ValueError says why it is bad.
        options: Arguments of `model.preprocess`, such as the prompt.
        batch_key: Equal for inputs that the processor can take in one call.
        last_token: What every input must end in, the last BTok; None for models without BToks.
        limit: Tokens that an input with media is fitted into; None leaves it to the model, as for texts.
    """

    model: SentenceTransformer
    read: Callable[[Any], Any]
    options: dict[str, Any] = field(default_factory=dict)
    batch_key: Callable[[Any], Any] = type
    last_token: int | None = None
    limit: int | None = None

    def read_row(self, value: Any) -> Row:
        """One input, read; memory that can't be had is the row's fault too, as its medium is too large."""
        try:
            found = self.read(value)
            return Row([], value=found, content=None if is_text(found) else content_of(found))
        except (ValueError, MemoryError) as error:
            return Row([], reason=str(error) or type(error).__name__)

    def preprocess(self, rows: Sequence[Row]) -> None:
        """Give rows their features and lengths; texts come together, everything else alone."""
        try:
            features = self._features(rows)
        except TooLongError as error:
            rows[0].reason, rows[0].value = str(error), None
            return
        except Exception as error:  # what processors raise differs by family
            if len(rows) > 1:
                for row in rows:
                    self.preprocess([row])
            else:
                rows[0].reason = f"the model's processor refuses it: {str(error) or type(error).__name__}"
                rows[0].value = None
            return
        # Without its BToks a `mean` model would answer with the zero vector.
        if len(rows) == 1 and self.last_token is not None and last_token(features) != self.last_token:
            rows[0].reason = (
                f"an input must end in its bottleneck tokens, but they are cut off and {num_tokens(features)} tokens "
                "are left of this one. Raise model.max_seq_length"
            )
            rows[0].value = None
            return
        if not can_collate(features):
            if len(rows) > 1:  # without padding one tensor holds them all, which hides the lengths
                for row in rows:
                    self.preprocess([row])
            else:
                rows[0].length = num_tokens(features)
            return
        cut = cut_rows(features) if len(rows) > 1 else [features]
        for row, own in zip(rows, cut, strict=True):
            row.features, row.length, row.value = own, num_tokens(own), None

    def _features(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Features of texts together, or of one row with media, whose value is then as long as it may be."""
        values = [row.value for row in rows]
        if self.limit is None or len(rows) > 1 or is_text(values[0]):
            return dict(self.model.preprocess(values, **self.options))
        fitted = fit(values[0], lambda value: self.batch([value]), self.limit, self.model.tokenizer)
        rows[0].value = fitted.value
        return fitted.features

    def batch(self, values: Sequence[Any]) -> dict[str, Any]:
        """What the processor makes of inputs whose length was seen to before."""
        options = dict(self.options)
        if self.limit is not None and not any(map(is_text, values)):
            options["processing_kwargs"] = without_limits(options.get("processing_kwargs"))
        return dict(self.model.preprocess(values, **options))


def windows(items: Iterable[tuple[int, Any]], prepare: Preparation) -> Iterator[list[Row]]:
    """Read and preprocess inputs, window by window.

    Args:
        items: Row numbers and inputs.
        prepare: How rows become features.

    Yields:
        Rows of one window, bad ones among them, in the order of their first number.
    """
    window: list[Row] = []
    texts: list[Row] = []
    known: dict[Any, Row] = {}
    pictured: dict[Any, Row] = {}
    copies: list[Any] = []
    size = 0
    for row in _distinct_rows(items, prepare, known):
        if row.content is not None and (same := pictured.setdefault(row.content, row)) is not row:
            same.numbers += row.numbers
            known[row.key] = same
            copies.append(row.key)
            continue
        window.append(row)
        if not row.reason and is_text(row.value):
            texts.append(row)
        elif not row.reason:
            prepare.preprocess([row])
            size += num_bytes(row.features) if row.features else decoded_bytes(row.value)
        full = len(window) >= WINDOW_ROWS or size >= WINDOW_BYTES
        if full or len(texts) >= _TEXTS:
            _preprocess_texts(texts, prepare)
            texts = []
        if full:
            yield window
            # A copy that comes later would wait for a vector that was handed out already.
            for key in [*copies, *(done.key for done in window)]:
                known.pop(key, None)
            pictured.clear()
            copies.clear()
            window, size = [], 0
    _preprocess_texts(texts, prepare)
    if window:
        yield window


def _distinct_rows(items: Iterable[tuple[int, Any]], prepare: Preparation, known: dict[Any, Row]) -> Iterator[Row]:
    """Rows in order, decoded by threads; an input that is known already only adds its number to that row."""
    under_way: deque[tuple[Row, Future[Row] | None]] = deque()
    num_futures = 0
    with ThreadPoolExecutor(READERS) as pool:
        for number, value in items:
            key = identity(value)
            if key in known:
                known[key].numbers.append(number)
                continue
            row = known[key] = Row([number], key=key)
            future = None if _is_quick(value) else pool.submit(prepare.read_row, value)
            if future is None:
                _fill(row, prepare.read_row(value))
            under_way.append((row, future))
            num_futures += future is not None
            while num_futures > READERS or len(under_way) > _TEXTS:
                first, future = under_way.popleft()
                num_futures -= future is not None
                yield _fill(first, future.result() if future is not None else first)
        while under_way:
            first, future = under_way.popleft()
            yield _fill(first, future.result() if future is not None else first)


def _fill(row: Row, read: Row) -> Row:
    row.value, row.content, row.reason = read.value, read.content, read.reason
    return row


def _preprocess_texts(rows: Sequence[Row], prepare: Preparation) -> None:
    """Texts in as few calls as possible; conversations apart, as sentence-transformers reads them differently."""
    for chosen in (
        [row for row in rows if not isinstance(row.value, list)],
        [r for r in rows if isinstance(r.value, list)],
    ):
        if chosen:
            prepare.preprocess(chosen)


def batches(window: Sequence[Row], prepare: Preparation, tokens: int, rows: int | None) -> Iterator[list[Row]]:
    """Rows of a window that run together, the longest first.

    Args:
        window: Preprocessed rows; bad ones are left out.
        prepare: How rows become features.
        tokens: Padded tokens of a batch, at most; a longer row runs alone.
        rows: Rows of a batch, at most. Default: no limit.

    Yields:
        Rows that can share a batch.
    """
    groups: dict[Any, list[Row]] = {}
    ready = [row for row in window if row.features is not None]
    for row, key in zip(ready, signatures([row.features or {} for row in ready]), strict=True):
        groups.setdefault(("features", key), []).append(row)
    for row in window:
        if row.features is None and not row.reason:
            groups.setdefault(("inputs", is_text(row.value), prepare.batch_key(row.value)), []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: -row.length)
        batch: list[Row] = []
        waste = 0
        for row in group:
            longest = batch[0].length if batch else row.length
            padded = longest * (len(batch) + 1)
            waste += longest - row.length
            too_many = padded > tokens or (rows is not None and len(batch) >= rows)
            # Little batches pay more for their calls than for padding, so some of it is always allowed.
            too_loose = waste > max(_WASTE * padded, tokens / 32)
            if batch and (too_many or too_loose):
                yield batch
                batch, waste = [], 0
            batch.append(row)
        if batch:
            yield batch


def batch_features(batch: Sequence[Row], prepare: Preparation) -> dict[str, Any]:
    """What the model reads.

    Args:
        batch: Rows from `batches`.
        prepare: How rows become features.

    Returns:
        Features of the batch, on the CPU.
    """
    if batch[0].features is None:
        return prepare.batch([row.value for row in batch])
    tokenizer = prepare.model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    side = getattr(tokenizer, "padding_side", "right")
    return collate([row.features for row in batch if row.features is not None], pad or 0, side)


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each made by a thread while the one before it is used.

    Args:
        items: An iterable; it runs in one thread, never in two at once.

    Yields:
        Its items.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, iterator, _END)
            yield item


def is_text(value: Any) -> bool:
    """Whether an input, as read, has no media.

    Args:
        value: A normalised input.

    Returns:
        True for a text, a dict of texts, or a conversation of texts.
    """
    if isinstance(value, list):
        contents = [turn["content"] for turn in value]
        return all(isinstance(c, str) or all(part["type"] == "text" for part in c) for c in contents)
    return isinstance(value, str) or (isinstance(value, dict) and value.keys() == {"text"})


def _is_quick(value: Any) -> bool:
    """Whether reading costs less than handing it to a thread: what can be no path and no address."""
    if isinstance(value, dict):
        return value.keys() == {"text"}
    return isinstance(value, str) and "." not in value[-8:] and not value.startswith(("data:", "http"))


def decoded_bytes(value: Any) -> int:
    """Memory of the media of an input, as read.

    Args:
        value: A normalised input.

    Returns:
        Bytes, four for each pixel of an image.
    """
    if isinstance(value, dict):
        return sum(decoded_bytes(item) for item in value.values())
    if isinstance(value, list):
        return sum(decoded_bytes(item) for item in value)
    if isinstance(value, Image.Image):
        return 4 * value.width * value.height
    return int(getattr(value, "nbytes", 0))
