"""A corpus of any form as numbered records, read in order and in flat memory; a broken record is a reason, not an end.

| corpus | a record |
|---|---|
| `.jsonl`, `.json` (one object a line) | the object |
| `.csv` | a row, by its header |
| `.parquet` | a row; image columns of `datasets` stay encoded |
| a folder of files | each file, by its type: an image, a video, or the words of a `.txt` or `.md` |
| a folder that `datasets` saved, or the name of a data set on the hub (`name` or `name:split`) | a row |

The columns `text`, `image` and `video` are the input, in the order of the columns; `id` names the row.
"""

from __future__ import annotations

import csv
import hashlib
import json
import mimetypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Image, Video, load_dataset, load_from_disk

_CONTENT = ("text", "image", "video")
_PIECE = 2**20


class BrokenRecordError(ValueError):
    """A record without an input; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """A corpus that was opened.

    Attributes:
        parts: Files of one kind, in order; or one data set.
        kind: `jsonl`, `csv`, `parquet`, `folder` or `dataset`.
        folder: Where relative paths start from.
        num_rows: Records.
        digest: Changes with the content: the bytes of the tables, or name, size and time of the files of a folder.
    """

    parts: tuple[Any, ...]
    kind: str
    folder: Path
    num_rows: int
    digest: str

    def records(self, first: int, stop: int) -> Iterator[Any]:
        """Records of a range: dicts, or a `BrokenRecordError` in the place of a broken one."""
        if self.kind == "dataset":
            return (self.parts[0][number] for number in range(first, stop))
        if self.kind == "folder":
            return (_file_record(path, self.folder) for path in self.parts[first:stop])
        if self.kind == "parquet":
            return islice(_parquet_records(self.parts, first), stop - first)
        read = _json_records if self.kind == "jsonl" else _csv_records
        return islice((record for path in self.parts for record in read(path)), first, stop)


def open_corpus(names: Sequence[str]) -> Corpus:
    """Open a corpus and count it: one pass over the bytes of JSONL and CSV files, the footers of Parquet files.

    Args:
        names: Files of one kind, one folder, or one name on the hub.

    Returns:
        The corpus.

    Raises:
        ValueError: If there is nothing, the files are of several kinds, or there is no column text, image or video.
    """
    paths = [Path(name) for name in names]
    if len(paths) == 1 and not paths[0].is_file():
        return _open_folder(paths[0]) if paths[0].is_dir() else _open_dataset(names[0])
    missing = [str(path) for path in paths if not path.is_file()]
    kinds = {{".json": ".jsonl"}.get(path.suffix, path.suffix) for path in paths}
    if missing or len(kinds) != 1 or not kinds <= {".jsonl", ".csv", ".parquet"}:
        raise ValueError(
            f"the corpus must be files of one kind (.jsonl, .csv, .parquet), one folder or one data set, got "
            f"{list(names)[:5]}; missing: {missing[:5] or 'none'}. Check the paths."
        )
    kind = kinds.pop().removeprefix(".")
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
    if kind == "parquet":
        _need_content(pq.ParquetFile(paths[0]).schema_arrow.names, paths[0])
        num_rows = sum(pq.ParquetFile(path).metadata.num_rows for path in paths)
    else:
        read = _json_records if kind == "jsonl" else _csv_records
        num_rows = 0
        columns: set[str] = set()
        for path in paths:
            for record in read(path):
                num_rows += 1
                columns |= record.keys() if isinstance(record, dict) and len(columns) < 100 else set()
        if num_rows:
            _need_content(sorted(map(str, columns)), paths[0])
    return Corpus(tuple(paths), kind, paths[0].parent, num_rows, digest.hexdigest())


def _need_content(columns: Sequence[str], where: Path | str) -> None:
    if not set(_CONTENT) & set(columns):
        raise ValueError(
            f"the corpus must have a column text, image or video, {where} has {list(columns)}. Rename one."
        )


def _open_folder(folder: Path) -> Corpus:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(str(folder))
        return _of_table(saved["train"] if isinstance(saved, DatasetDict) else saved, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ValueError(f"the folder {folder} holds no files. Check the path.")
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.blake2b(json.dumps(facts).encode(errors="surrogateescape"), digest_size=16)
    return Corpus(tuple(files), "folder", folder, len(files), digest.hexdigest())


def _open_dataset(name: str) -> Corpus:
    repository, _, split = name.partition(":")
    if repository.count("/") > 1 or Path(repository).suffix in (".jsonl", ".json", ".csv", ".parquet"):
        raise ValueError(f"there is no file or folder {name!r}. Check the path.")
    return _of_table(load_dataset(repository, split=split or "train"), Path())


def _of_table(table: Dataset, folder: Path) -> Corpus:
    _need_content(table.column_names, folder)
    for column, feature in table.features.items():
        if isinstance(feature, Image | Video):
            table = table.cast_column(column, type(feature)(decode=False))
    return Corpus((table,), "dataset", folder, len(table), table._fingerprint)


def _json_records(path: Path) -> Iterator[Any]:
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


def _csv_records(path: Path) -> Iterator[Any]:
    csv.field_size_limit(2**30)
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        for record in csv.DictReader(lines):
            record.pop(None, None)  # more fields than the header has  # type: ignore[call-overload]
            yield record


def _parquet_records(paths: Sequence[Path], first: int) -> Iterator[Any]:
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


def _file_record(path: Path, folder: Path) -> Any:
    record: dict[str, Any] = {"id": str(path.relative_to(folder))}
    kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
    if kind in ("image", "video"):
        return {**record, kind: str(path.relative_to(folder))}
    if kind == "text":
        return {**record, "text": path.read_bytes().decode(errors="surrogateescape")}
    return {**record, "error": f"the name {path.name!r} tells no image, video or text"}


def as_input(record: Any, folder: Path) -> dict[str, Any]:
    """The input of a record, undecoded, in the order of its columns.

    Args:
        record: From `Corpus.records`.
        folder: Where relative paths start from.

    Returns:
        A dict for the reader of `st_btok`, so that no text is taken for a path.

    Raises:
        BrokenRecordError: If there is no content.
    """
    if isinstance(record, Exception):
        raise record
    if record.get("error") and not set(_CONTENT) & record.keys():
        raise BrokenRecordError(record["error"])
    inputs: dict[str, Any] = {}
    for kind in record:
        value = record[kind]
        if kind not in _CONTENT or value is None or value in ("", []):
            continue
        inputs[kind] = value if kind == "text" else _placed(value, folder)
    if not inputs or (inputs.keys() == {"text"} and isinstance(inputs["text"], str) and not inputs["text"].strip()):
        raise BrokenRecordError("the row is empty: neither text nor media")
    return inputs


def _placed(value: Any, folder: Path) -> Any:
    """Media of a record: paths start from the folder; what `datasets` stores is its bytes or its path."""
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        return value["bytes"] if value.get("bytes") else _placed(value.get("path"), folder)
    if isinstance(value, str) and not value.startswith(("data:", "http://", "https://")) and len(value) < 4096:
        return str(folder / value)
    return value
