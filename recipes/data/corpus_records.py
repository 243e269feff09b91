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
ADDRESSES = ("data:", "http://", "https://")


def undecoded(table: Any) -> Any:
    """A data set, on this machine or streamed, whose columns of images and videos are left as they are stored."""
    for column, feature in (table.features or {}).items():
        if isinstance(feature, Image | Video):
            table = table.cast_column(column, type(feature)(decode=False))
    return table


def of_tables(paths: Sequence[Path], first: int) -> Iterator[Any]:
    """Rows of files, with their paths from the first file's folder on.

    Whole Parquet files and row groups before the first row are passed over unread.
    """
    for path in paths:
        place = beside(path, paths[0])
        if path.suffix.lower() == ".parquet":
            _, num_rows = parquet_facts(path)
            if first >= num_rows:
                first -= num_rows
                continue
            yield from (_from_folder(place, record) for _, record in read_table(path, first))
            first = 0
            continue
        for _, record in read_table(path):
            if first:
                first -= 1
            else:
                yield _from_folder(place, record)


def beside(path: Path, first: Path) -> Path:
    """The way from the folder of a corpus's first file to that of another one, where the other's media start."""
    # Without links: behind one, `..` leads elsewhere.
    return Path(os.path.relpath(path.parent.resolve(), first.parent.resolve()))


def _from_folder(place: Path, record: Any) -> Any:
    if place == Path() or not isinstance(record, dict):
        return record
    return {key: placed(value, place) if key in ("image", "video") else value for key, value in record.items()}


def placed(value: Any, folder: Path) -> Any:
    """Media of a record: paths start from the folder; what `datasets` stores is its bytes or its path."""
    if isinstance(value, list):
        return [placed(item, folder) for item in value]
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        return value["bytes"] if value.get("bytes") else placed(value.get("path"), folder)
    if isinstance(value, str) and value and not value.startswith(ADDRESSES) and len(value) < 4096:
        return str(folder / value)
    return value


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


def would_list(folder: Path, path: Path) -> bool:
    """Whether `files_in` comes upon a path, there already or not: it is the folder, or in it and not hidden."""
    root, place = folder.resolve(), path.resolve()
    return (
        folder.is_dir()
        and place.is_relative_to(root)
        and not any(name.startswith(".") for name in place.relative_to(root).parts)
    )


def _file_record(path: Path, folder: Path) -> Any:
    record: dict[str, Any] = {"id": str(path.relative_to(folder))}
    kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
    if kind in ("image", "video"):
        return {**record, kind: str(path.relative_to(folder))}
    if kind == "text":
        # A byte-order mark is no text.
        return {**record, "text": path.read_bytes().decode("utf-8-sig", errors="surrogateescape")}
    return {**record, "error": f"the name {path.name!r} tells no image, video or text"}
