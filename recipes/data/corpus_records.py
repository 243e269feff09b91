"""The records of each form of a corpus, from a number on, in flat memory."""

from __future__ import annotations

import csv
import json
import mimetypes
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset

CONTENT = ("text", "image", "video")


class BrokenRecordError(ValueError):
    """A record without an input; the message says why."""


def of_json(paths: Sequence[Path], first: int) -> Iterator[Any]:
    """Objects of JSONL files, blank lines left out."""
    return islice((record for path in paths for record in _objects(path)), first, None)


def _objects(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BrokenRecordError(f"the line is no JSON: {error}")
                continue
            yield record if isinstance(record, dict) else BrokenRecordError("the line is no JSON object")


def of_csv(paths: Sequence[Path], first: int) -> Iterator[Any]:
    """Rows of CSV files, by their headers."""
    return islice((record for path in paths for record in _rows(path)), first, None)


def _rows(path: Path) -> Iterator[Any]:
    csv.field_size_limit(2**30)
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        for record in csv.DictReader(lines):
            record.pop(None, None)  # more fields than the header has  # type: ignore[call-overload]
            yield record


def of_parquet(paths: Sequence[Path], first: int) -> Iterator[Any]:
    """Rows of Parquet files; whole files and row groups before the first row are passed over unread."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            if first >= file.metadata.num_rows:
                first -= file.metadata.num_rows
                continue
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if first >= size:
                    first -= size
                    continue
                for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                    if first >= len(batch):
                        first -= len(batch)
                        continue
                    yield from batch.slice(first).to_pylist()
                    first = 0


def of_table(table: Dataset, first: int) -> Iterator[Any]:
    """Rows of a data set on this machine."""
    return (table[number] for number in range(first, len(table)))


def of_stream(stream: IterableDataset, first: int) -> Iterator[Any]:
    """Rows of a data set that is read as it is downloaded."""
    return iter(stream.skip(first) if first else stream)


def of_folder(folder: Path, first: int) -> Iterator[Any]:
    """The files of a folder as records."""
    return (_file_record(path, folder) for path in islice(files_in(folder), first, None))


def files_in(folder: Path) -> Iterator[Path]:
    """Files of a folder and the folders in it, by name; one folder's names are held at a time, hidden files are not.

    Args:
        folder: A folder.

    Yields:
        Paths, always in the same order.
    """
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in names:
        path = folder / name
        if is_folder and not path.is_symlink():  # a link can lead back up
            yield from files_in(path)
        elif not is_folder and not name.startswith(".") and path.is_file():
            yield path


def _file_record(path: Path, folder: Path) -> Any:
    record: dict[str, Any] = {"id": str(path.relative_to(folder))}
    kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
    if kind in ("image", "video"):
        return {**record, kind: str(path.relative_to(folder))}
    if kind == "text":
        return {**record, "text": path.read_bytes().decode(errors="surrogateescape")}
    return {**record, "error": f"the name {path.name!r} tells no image, video or text"}
