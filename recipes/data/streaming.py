"""Pairs that are read as training needs them: corpora that don't fit on the disk, or whose check would take days.

`--stream` reads each `--data` through `datasets` without a pass over it first: tar shards of WebDataset
(`shards/*.tar`, also by address), `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, or a data set on the hub. Columns are
those of `user_data.py`, text tables are read by `tables.py`. A sample of a tar is made of its members' names,
`KEY.SIDE.EXTENSION`:

    000.query.txt  000.positive.jpg  000.negative.txt    or all texts in    000.json  {"query": ..., "negative": ...}

Members without a side, `000.txt` and `000.jpg`, are a text that searches for an image.

The first `--validation_size` rows of each source are checked and held out, and no row of any source that shares
content with them trains (`contents` of `holdout.py`). All others are checked when they come: a broken one is an error
(`--on_error raise`), or is passed over and listed in `skipped_rows.jsonl`. Nobody knows the number of rows, so a
training needs `--max_steps`; when the rows end they begin anew. Order: a buffer of `--shuffle_buffer` rows, from which
the next is drawn; sources by their weights. Resuming reads the rows again up to where training stopped.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets

from evaluation.media import BrokenMediaError
from recipes.data.corpus_records import undecoded
from recipes.data.holdout import contents, has_labels
from recipes.data.tables import TEXT_SUFFIXES
from recipes.data.training_pairs import BrokenRowError, Source, as_input, check_source, checked_side
from recipes.data.user_data import (
    PACKED,
    is_file_name,
    load_named,
    packed_rows,
    read_pair,
    sides_of,
    usual_names,
    warn_of_paths,
    with_keys,
)

logger = logging.getLogger(__name__)

_LOADERS = {
    ".tar": "webdataset",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
_HEAD = 64  # rows that are looked at before anything expensive, if none are held out
_LOGGED = 20
_shown: set[tuple[str, int, str]] = set()
_PLACED = Features({**PACKED, "folder": Value("string")})


@dataclass(frozen=True)
class Streams:
    """What a streamed training reads.

    Attributes:
        rows: Endless inputs of sentence-transformers, all sources mixed.
        heads: The first rows of every source, checked.
        held_out: Those of them that validate.
        files: Names of every source's files, with sizes where they are known.
    """

    rows: IterableDataset
    heads: list[Source]
    held_out: list[Source]
    files: dict[str, list[str]]


def open_streams(
    paths: Sequence[str],
    weights: Sequence[float] = (),
    *,
    held_out: int = 0,
    buffer: int = 1000,
    seed: int = 0,
    skipped: Path | None = None,
    negatives: bool = True,
    **check: Any,
) -> Streams:
    """Open sources for reading, and check their first rows.

    Args:
        paths: Files, patterns of files, or hub names; each is a source of its own.
        weights: Shares in the mix, one per path. Default: equal ones.
        held_out: Rows of each source that validate.
        buffer: Rows among which the next one is drawn; at most 1: in order.
        seed: Of that draw and of the mix.
        skipped: File that lists broken rows.
        negatives: Whether columns of negatives train.
        **check: `on_error` and `check_media`, as for `check_source`.

    Returns:
        The streams.

    Raises:
        ValueError: Another number of weights than paths, missing columns, no usable row among the first, or a broken
            one with `on_error="raise"`.
    """
    if weights and len(weights) != len(paths):
        raise ValueError(f"weights must have one value per data set, got {len(weights)} for {len(paths)}.")
    opened = [_opened(path, held_out, negatives, check) for path in paths]
    heads, files = [each.head for each in opened], {each.head.name: each.files for each in opened}
    known = frozenset(key for each in opened if held_out for key in each.contents())
    options = {"known": known, "skipped": str(skipped or ""), **check}
    # Held-out rows are left out by their content: `skip` would be split among the loader's workers, and each would
    # pass over rows of its own files.
    streams = [each.rows(**options) for each in opened]
    streams = [rows.shuffle(seed=seed, buffer_size=buffer) if buffer > 1 else rows for rows in streams]
    if held_out:  # told by the check of the heads
        _shown.update((entry.dataset, entry.index, entry.reason) for head in heads for entry in head.broken)
    columns = [head.pairs.column_names for head in heads]
    if any(names != columns[0] for names in columns):
        raise ValueError(
            f"streamed sources must have the same columns, got {columns}. Train without their negatives: "
            "--hard_negatives none."
        )
    rows = streams[0]
    if len(streams) > 1:
        shares = list(weights) or [1.0] * len(paths)
        shares = [share / sum(shares) for share in shares]
        rows = interleave_datasets(streams, shares, seed=seed, stopping_strategy="all_exhausted")
    rows.__class__, rows.sides = _NamedColumns, columns[0]
    return Streams(rows, heads, heads if held_out else [], files)


@dataclass(frozen=True)
class _Opened:
    """A source: its first rows, checked, and what reads all of them."""

    head: Source
    table: IterableDataset
    read: Any
    files: list[str]
    labels: bool

    def contents(self) -> Iterator[str]:
        """What no row that trains may hold."""
        for record in self.head.pairs:
            yield from contents(record, self.labels)

    def rows(self, **options: Any) -> IterableDataset:
        """The rows that train, checked as they come."""
        sides = tuple(self.head.pairs.column_names)  # negatives that a row of the head lacks are not used
        options |= {"name": self.head.name, "read": self.read, "sides": sides, "labels": self.labels}
        return self.table.map(
            partial(_checked_rows, **options),
            with_indices=True,
            batched=True,
            batch_size=1,  # a row that is passed over is a batch of none
            remove_columns=_columns(self.table),
        )


def _opened(path: str, held_out: int, negatives: bool, check: dict[str, Any]) -> _Opened:
    """One source. Its first rows tell the columns, and validate where some are held out."""
    name = re.sub(r"\W+", "-", path.removesuffix("*.tar")).strip("-")
    table, places = _open(path)
    records = [_as_columns(record) for record in islice(table, held_out + 1 if held_out else _HEAD)]
    if not records:
        raise ValueError(f"{path} has no rows. Write some, or leave it out.")
    if held_out and len(records) <= held_out:
        raise ValueError(
            f"{path} must have more rows than are held out, but has {len(records)} for --validation_size {held_out}, "
            "so none would train. Pass a smaller --validation_size, or leave out --stream, which holds out a tenth."
        )
    records = records[:held_out] if held_out else records
    is_packed = records[0].keys() >= PACKED.keys()
    columns = [column for record in records for column in _columns_of(record, is_packed)]
    names = usual_names(list(dict.fromkeys(columns)))
    if is_packed and not names:
        raise ValueError(f"{path} has no row that can be read: {records[0]['problem'] or 'all are empty'}.")
    sides = sides_of(names, path)
    folders = {str(Path(place).parent) for place in places}
    if len(folders) > 1 and not is_packed:
        _refuse_relative_paths(path, len(folders), records)
    folder = min(folders, default="")
    read = partial(read_pair, sides=sides, folder=folder, names=names if is_packed else None)
    head = check_source(name, Dataset.from_list(records, _PLACED if is_packed else None), read, sides, **check)
    head = head if negatives else head.without_negatives()
    warn_of_paths(head, folder)
    files = [
        f"{Path(place).name}, {Path(place).stat().st_size} bytes" if Path(place).is_file() else place
        for place in places or [path]
    ]
    return _Opened(head, table, read, files, bool(held_out) and has_labels(head))


def _columns_of(record: Mapping[str, Any], is_packed: bool) -> list[str]:
    return json.loads(record["columns"]) if is_packed else with_keys(record)


def _refuse_relative_paths(path: str, folders: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Rows of Parquet files and shards don't say which file they are from."""
    for row, record in enumerate(records):
        for column, value in record.items():
            named = value.get("path") if isinstance(value, Mapping) and not value.get("bytes") else value
            is_medium = column.endswith(("_image", "_video")) and isinstance(named, str)
            if is_medium and not Path(named or "/").is_absolute():
                raise ValueError(
                    f"{path} matches files of {folders} folders, so they must hold their media or name them by "
                    f"absolute paths, but row {row} has {column} {named!r}. Pass a --data for each folder."
                )


class _NamedColumns(IterableDataset):
    """A stream that says its columns' names; `datasets` does with their types only, and decoded inputs have none."""

    sides: list[str]

    @property
    def column_names(self) -> list[str]:
        """The sides."""
        return self.sides


def _open(path: str) -> tuple[IterableDataset, list[str]]:
    """The undecoded rows, and the places of the files: paths in the rows start from their folders."""
    suffix = Path(path).suffix.lower()
    if suffix not in _LOADERS:
        if is_file_name(path):
            raise ValueError(
                f"a data file must be one of {', '.join(_LOADERS)}, got {path!r}. Save it as one of them."
            )
        return undecoded(load_named(path, path, streaming=True)), []
    found = [path] if "://" in path else sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"no file matches {path!r}. Check the path.")
    if suffix in TEXT_SUFFIXES and "://" not in path:
        table = IterableDataset.from_generator(_placed_rows, features=_PLACED, gen_kwargs={"paths": found})
    else:
        table = load_named(path, _LOADERS[suffix], data_files=found, streaming=True)
    return undecoded(table), found


def _placed_rows(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of text tables with the folder that their media are relative to."""
    for path in paths:
        for row in packed_rows([path]):
            yield {**row, "folder": str(Path(path).parent)}


def _columns(table: IterableDataset) -> list[str]:
    return list(table.column_names or next(iter(table)))


def _as_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row, or a sample of a tar, with the columns of `user_data.py`."""
    if "__key__" not in record:
        names = usual_names(list(record))
        return {names[column]: value for column, value in record.items()}
    columns: dict[str, Any] = dict(record.get("json") or {})
    for member, value in record.items():
        side, _, extension = member.rpartition(".")
        kind = "image" if extension.lower() in _IMAGES else "text" if extension == "txt" else ""
        if not kind or value is None:
            continue
        side = side or ("positive" if kind == "image" else "query")
        columns[f"{side}_{kind}"] = value
    return columns


def _checked_rows(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    name: str,
    read: Any,
    sides: tuple[str, ...],
    labels: bool,
    known: frozenset[str],
    on_error: str,
    check_media: Any,
    skipped: str,
) -> dict[str, list[Any]]:
    """One row as inputs of sentence-transformers; none where it is broken, or too like a held-out one."""
    out: dict[str, list[Any]] = {side: [] for side in sides}
    for values, row in zip(_rows(batch), indices, strict=True):
        record = _as_columns(values)
        try:
            found = {side: checked_side(side, value, record, check_media) for side, value in read(record).items()}
            missing = [side for side in sides if side not in found]
            if missing:
                raise BrokenRowError(f"{missing[0]} is empty: neither text nor media")
            inputs = {side: as_input(asdict(replace(found[side], row=0)), [record]) for side in sides}
        except (BrokenRowError, BrokenMediaError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
            _report(name, row, f"{error}", on_error, skipped)
            continue
        if not known.isdisjoint(contents({side: asdict(found[side]) for side in sides}, labels)):
            continue
        for side in sides:
            out[side].append(inputs[side])
    return out


def _rows(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for number in range(len(next(iter(batch.values())))):
        yield {column: values[number] for column, values in batch.items()}


def _report(name: str, row: int, reason: str, on_error: str, skipped: str) -> None:
    if on_error == "raise":
        raise BrokenRowError(
            f'{name}, row {row} is broken: {reason}. Repair it, or train without such rows: on_error="skip".'
        )
    if (name, row, reason) in _shown:  # the rows have begun anew
        return
    _shown.add((name, row, reason))
    if len(_shown) <= _LOGGED:
        logger.warning("%s, row %d skipped: %s", name, row, reason)
    if skipped:
        with open(skipped, "a", encoding="utf-8") as file:
            file.write(json.dumps({"dataset": name, "index": row, "reason": reason}) + "\n")
