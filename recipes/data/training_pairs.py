"""The training pairs of one source: read and checked once, kept as text and references, decoded when a batch asks.

A reader turns one row of a source's table into sides (query, positive, negatives); `check_source` runs it over the
table with a progress bar, reads every image and frame once, and keeps what is whole. The result is a small table of
texts, paths and digests. Media are opened again only for the batches that use them, in the data loader's workers, so
the decoded corpus is never in memory, and embedded images are never copied.

Media are read by `st_btok`, so training sees the pixels and frames that encoding sees. Cost of the check: each file
is read once, and with `check_media="decode"` decoded once, as for training. `datasets` caches the result, source by
source and, with `num_proc`, part by part: a second or interrupted run goes on from there.
A file that is repaired or damaged later is seen with `recheck=True`, which the log says where rows are skipped.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from pyarrow import compute

from evaluation.media import FRAME_SUFFIXES, BrokenMediaError
from evaluation.pool import BrokenRow
from recipes.data.corpus_records import undecoded
from st_btok import open_image, read_video, rgb_image

logger = logging.getLogger(__name__)

CheckMedia = Literal["decode", "header"]
_LOGGED = 20  # broken rows of a source that are logged one by one; `Source.broken` has them all
_SIDE = {
    "text": Value("string"),
    "image": Value("string"),
    "video": List(Value("string")),
    "column": Value("string"),
    "digest": Value("string"),
    "row": Value("int64"),
}


class BrokenRowError(ValueError):
    """A row that can't be trained on; the message says why."""


@dataclass(frozen=True)
class Side:
    """A query, positive or negative.

    Args:
        text: Text, instruction included; empty for media alone.
        image: Path of an image.
        video: Paths of the frames to show, in order, or of one video file.
        column: Column of the source's table that holds the image itself, instead of a path.
        digest: Identity of the media by content; `check_source` fills it.
        row: Row of the source's table; `check_source` fills it.
    """

    text: str = ""
    image: str = ""
    video: tuple[str, ...] = ()
    column: str = ""
    digest: str = ""
    row: int = -1


Reader = Callable[[Mapping[str, Any]], Mapping[str, Side]]


@dataclass(frozen=True)
class Source:
    """The checked pairs of one source.

    Args:
        name: Name in logs, losses and the model card; without dots (module names can't hold them).
        pairs: Columns `query`, `positive`, and one for every negative that all rows have, as `Side`s: undecoded.
        table: The source's own table, which holds embedded images.
        num_rows: Rows of the table before the check.
        broken: What was skipped, with row and reason.
        weight: Share in the mix, relative to the other sources.
        target: The side that is generated: `auto`, `query`, `positive`, `both` or `none`.
        instructions: Texts that precede the content and are not generated.
        hub_id: Data set repository, for the model card.
    """

    name: str
    pairs: Dataset
    table: Dataset
    num_rows: int
    broken: tuple[BrokenRow, ...] = ()
    weight: float = 1.0
    target: str = "auto"
    instructions: tuple[str, ...] = ()
    hub_id: str = ""

    def select(self, rows: np.ndarray) -> Source:
        """The same source with some of its pairs."""
        return replace(self, pairs=self.pairs.select(rows))

    def without_negatives(self) -> Source:
        """The same source with queries and positives only."""
        return replace(self, pairs=self.pairs.select_columns(["query", "positive"]))

    def media(self) -> set[str]:
        """Which of `image` and `video` occur in the pairs."""
        table, found = self.pairs.with_format("arrow")[:], set()
        for name in table.column_names:
            side = table[name].combine_chunks()
            sizes = {field: compute.binary_length(side.field(field)) for field in ("image", "column")}
            sizes["video"] = compute.list_value_length(side.field("video"))
            used = [field for field, size in sizes.items() if (compute.max(size).as_py() or 0) > 0]
            found |= {"image" if field == "column" else field for field in used}
        return found

    def dataset(self) -> Dataset:
        """The pairs as inputs of sentence-transformers; a row is decoded when it is read."""
        return self.pairs.with_transform(partial(_decode_rows, name=self.name, table=self.table))

    def read_all(self, places: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
        """Sides of pairs, each named by its row and side, decoded."""
        return [_decode(self.pairs[row][side], side, self.name, self.table) for row, side in places]


def check_source(
    name: str,
    table: Dataset,
    read: Reader,
    sides: tuple[str, ...] = ("query", "positive", "negative"),
    *,
    on_error: Literal["skip", "raise"] = "skip",
    check_media: CheckMedia = "decode",
    num_proc: int | None = None,
    recheck: bool = False,
    **about: Any,
) -> Source:
    """Read a source's table, check every row, keep the whole ones.

    Args:
        name: Name of the source.
        table: One row per pair; image columns are read undecoded.
        read: Turns a row into its sides; raises for a row without content. A `functools.partial` of a function of a
            module, so that `datasets` can cache what it did.
        sides: Sides that `read` may return. Negatives that some kept row lacks are left out, and the log says so.
        on_error: `skip` (default): broken rows are logged, counted and left out; `raise`: they are an error.
        check_media: `decode` (default): every image and frame is read to its end; `header`: read, but only the header
            is parsed, so a damaged end shows up in training, as an error.
        num_proc: Processes for the check.
        recheck: Ignore a cached check.
        **about: `weight`, `target`, `instructions`, `hub_id` of the `Source`.

    Returns:
        The source.

    Raises:
        ValueError: No usable row, or a broken one with `on_error="raise"`.
    """
    table = undecoded(table)
    # datasets hashes a module's function by its name only: with its code in the arguments, an edit is seen.
    code = "".join(inspect.getsource(inspect.getmodule(f)) for f in (check_source, getattr(read, "func", read)))
    options = {"read": read, "sides": sides, "check_media": check_media, "code": Hasher.hash(code)}
    checked = table.map(
        _check_rows,
        batched=True,
        batch_size=64,
        with_indices=True,
        fn_kwargs=options,
        remove_columns=table.column_names,
        features=Features({**dict.fromkeys(sides, _SIDE), "problem": Value("string")}),
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        load_from_cache_file=not recheck,
        desc=f"{name}: check",
    )
    problems = np.array(checked.with_format("numpy")["problem"][:], dtype=object)
    broken = tuple(BrokenRow(name, int(row), problems[row]) for row in np.flatnonzero(problems != ""))
    _report(broken, len(table), on_error)
    if len(broken) == len(table):
        first = "; ".join(f"row {entry.index}: {entry.reason}" for entry in broken[:3]) or "the table is empty"
        raise ValueError(f"{name} has no usable row of {len(table)} ({first}). Check the data root and its media.")
    kept = checked.select(np.flatnonzero(problems == "")).remove_columns("problem")
    kept = _drop_partial_negatives(name, kept, sides[2:])
    return Source(name, kept, table, len(table), broken, **about)


def _check_rows(
    batch: dict[str, list[Any]],
    indices: list[int],
    read: Reader,
    sides: tuple[str, ...],
    check_media: CheckMedia,
    code: str,
) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {side: [] for side in (*sides, "problem")}
    for number, row in enumerate(indices):
        record = {column: values[number] for column, values in batch.items()}
        found: dict[str, Side] = {}
        problem = ""
        try:
            found = {
                side: replace(checked_side(side, value, record, check_media), row=row)
                for side, value in read(record).items()
            }
        except (BrokenRowError, BrokenMediaError) as error:
            problem = str(error)
        except (KeyError, IndexError, TypeError, ValueError) as error:  # a row that is not of the documented form
            problem = f"{type(error).__name__}: {error}"
        for side in sides:
            out[side].append(asdict(found[side]) if side in found and not problem else None)
        out["problem"].append(problem)
    return out


def checked_side(name: str, side: Side, record: Mapping[str, Any], check_media: CheckMedia) -> Side:
    """Check one side and fill in its digest; raises `BrokenRowError` or `BrokenMediaError`."""
    if not side.text.strip() and not (side.image or side.video or side.column):
        raise BrokenRowError(f"{name} is empty: neither text nor media")
    digest = hashlib.blake2b(digest_size=16)
    try:
        if side.column:
            data = _embedded(side.column, record)
            _check_image(data, check_media)
            digest.update(data)
        if is_video_file(side.video):
            digest.update(_whole_video(Path(side.video[0]), check_media))
        for path in filter(None, (side.image, *(() if is_video_file(side.video) else side.video))):
            digest.update(_whole_image(Path(path), check_media))
    except BrokenMediaError as error:
        raise BrokenMediaError(f"{name}: {error}") from None
    has_media = bool(side.image or side.video or side.column)
    return replace(side, digest=digest.hexdigest() if has_media else "")


def _embedded(column: str, record: Mapping[str, Any]) -> bytes:
    value = record[column] or {}
    if value.get("bytes"):
        return value["bytes"]
    if value.get("path"):
        return _read(Path(value["path"]))
    raise BrokenMediaError(f"column {column} holds no image")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BrokenMediaError(f"file {str(path)!r} can't be read: {error.strerror}") from None


def is_video_file(paths: tuple[str, ...]) -> bool:
    """Whether the paths of a side's video are one video file, of any suffix, and not frames."""
    return len(paths) == 1 and Path(paths[0]).suffix.lower() not in FRAME_SUFFIXES


def _whole_video(path: Path, check_media: CheckMedia) -> bytes:
    """Path and size of a video file, whose content can be large."""
    if not path.is_file() or not path.stat().st_size:
        raise BrokenMediaError(f"video {str(path)!r} does not exist or is empty")
    if check_media == "decode":
        _broken_as_media_error(read_video, path)
    return f"{path.resolve()}:{path.stat().st_size}".encode()


def _whole_image(path: Path, check_media: CheckMedia) -> bytes:
    """Content of an image file."""
    data = _read(path)
    _check_image(str(path), check_media)  # out of the file cache by now
    return data


def _check_image(source: str | bytes, check_media: CheckMedia) -> None:
    _broken_as_media_error(rgb_image if check_media == "decode" else _read_header, source)


def _read_header(source: str | bytes) -> None:
    open_image(source).close()


def _broken_as_media_error(read: Callable[[Any], Any], source: Any) -> None:
    try:
        read(source)
    except (ValueError, MemoryError) as error:
        raise BrokenMediaError(str(error) or type(error).__name__) from None


def _report(broken: tuple[BrokenRow, ...], num_rows: int, on_error: str) -> None:
    if broken and on_error == "raise":
        rows = "\n".join(f"  row {entry.index}: {entry.reason.rstrip('.')}." for entry in broken[:20])
        raise ValueError(
            f"{broken[0].dataset}: {len(broken)} of {num_rows} rows are broken:\n{rows}\n"
            'Repair them, or train without them: on_error="skip".'
        )
    for entry in broken[:_LOGGED]:
        logger.warning("%s, row %d skipped: %s", entry.dataset, entry.index, entry.reason)
    if broken:
        shown = f" (the first {_LOGGED} are above)" if len(broken) > _LOGGED else ""
        again = "media that are repaired later stay skipped until recipes.train --recheck"
        logger.warning("%s: %d of %d rows skipped%s; %s", broken[0].dataset, len(broken), num_rows, shown, again)


def _drop_partial_negatives(name: str, kept: Dataset, negatives: tuple[str, ...]) -> Dataset:
    """A batch needs every column in every row, so negatives that some rows lack can't be used."""
    for side in negatives:
        missing = kept.select_columns([side]).with_format("arrow")[:].column(0).null_count
        if missing:
            kept = kept.remove_columns(side)
            if missing < len(kept):
                logger.warning("%s: column %s is not used, %d of %d rows lack it", name, side, missing, len(kept))
    return kept


def _decode_rows(batch: dict[str, list[Any]], name: str, table: Dataset) -> dict[str, list[Any]]:
    """Sides become inputs of sentence-transformers."""
    return {column: [_decode(side, column, name, table) for side in sides] for column, sides in batch.items()}


def _decode(side: Mapping[str, Any], column: str, name: str, table: Dataset) -> dict[str, Any]:
    try:
        return as_input(side, table)
    except (OSError, ValueError) as error:
        raise BrokenMediaError(
            f"{name}, row {side['row']}, {column}: {error}. The file was whole when it was checked, or only its "
            'header was looked at (check_media="header"). Check again with recheck=True.'
        ) from error


def as_input(side: Mapping[str, Any], table: Dataset) -> dict[str, Any]:
    """A side as input of sentence-transformers, media first; always a dict, so no text is taken for a file name.

    Args:
        side: The fields of a `Side`.
        table: The table that holds embedded images.

    Returns:
        `image` (RGB), `video` (frames, with metadata that keep every one of them) and `text`, where present.
    """
    inputs: dict[str, Any] = {}
    if side["column"]:
        inputs["image"] = rgb_image(_embedded(side["column"], table[side["row"]]))
    elif side["image"]:
        inputs["image"] = rgb_image(side["image"])
    if side["video"]:
        inputs["video"] = _video(tuple(side["video"]))
    if side["text"].strip():
        inputs["text"] = side["text"]
    return inputs


def content_key(side: Mapping[str, Any]) -> str:
    """Equal for sides with equal media and text."""
    return f"{side['digest']} {side['text']}"


def _video(paths: tuple[str, ...]) -> dict[str, Any]:
    """Frames as encoding shows them; without a clock they get one a second, of which every processor keeps all."""
    video = read_video(paths[0] if is_video_file(paths) else list(paths))
    numbers = list(range(len(video.frames)))
    times = {"total_num_frames": len(numbers), "fps": 1.0, "frames_indices": numbers}
    return {"array": video.frames, "video_metadata": video.metadata or times}
