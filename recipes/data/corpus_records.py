"""The records of each form of a corpus, from a number on, in flat memory."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, IterableDataset, Video

from recipes.data.tables import parquet_facts, read_table

CONTENT = ("text", "image", "video")


def undecoded(table: Any) -> Any:
    """A data set, on this machine or streamed, whose columns of images and videos are left as they are stored."""
    for column, feature in (table.features or {}).items():
        if isinstance(feature, Image | Video):
            table = table.cast_column(column, type(feature)(decode=False))
    return table


def of_tables(paths: Sequence[Path], first: int) -> Iterator[Any]:
    """Rows of files; whole Parquet files and row groups before the first row are passed over unread."""
    for path in paths:
        if path.suffix.lower() == ".parquet":
            _, num_rows = parquet_facts(path)
            if first >= num_rows:
                first -= num_rows
                continue
            yield from (record for _, record in read_table(path, first))
            first = 0
            continue
        for _, record in read_table(path):
            if first:
                first -= 1
            else:
                yield record


def of_table(table: Dataset, first: int) -> Iterator[Any]:
    """Rows of a data set on this machine."""
    return (table[number] for number in range(first, len(table)))


def of_stream(stream: IterableDataset, first: int) -> Iterator[Any]:
    """Rows of a data set that is read as it is downloaded."""
    return iter(stream.skip(first) if first else stream)


def of_folder(folder: Path, first: int) -> Iterator[Any]:
    """The files of a folder as records."""
    return (_file_record(path, folder) for path in islice(files_in(folder), first, None))


def files_in(folder: Path, unreadable: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """Files of a folder and the folders in it, by name; one folder's names are held at a time.

    Hidden files and folders are passed over, and so are links to folders, which can lead back up. A folder that can't
    be read is handed to `unreadable`; without that it is an error.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        if unreadable is None:
            raise
        unreadable(error)
        return
    for name, is_folder in names:
        path = folder / name
        if is_folder and not path.is_symlink():
            yield from files_in(path, unreadable)
        elif not is_folder and path.is_file():
            yield path


def _file_record(path: Path, folder: Path) -> Any:
    record: dict[str, Any] = {"id": str(path.relative_to(folder))}
    kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
    if kind in ("image", "video"):
        return {**record, kind: str(path.relative_to(folder))}
    if kind == "text":
        # A byte-order mark is no text.
        return {**record, "text": path.read_bytes().decode("utf-8-sig", errors="surrogateescape")}
    return {**record, "error": f"the name {path.name!r} tells no image, video or text"}
