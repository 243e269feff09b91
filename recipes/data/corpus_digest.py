"""What makes two corpora equal: the bytes of their tables, and size and time of every media file that these name.

Media count by size and time of change (nanoseconds), not by their bytes: a corpus of a million pictures would be read
whole at every start. So a changed picture under the same path is noticed, and a copy that lost its times is taken for
another corpus, which is refused rather than mixed: copy with times (`cp -p`, `rsync -t`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from recipes.data.corpus_records import ADDRESSES

_MEDIA = ("image", "video")
_PIECE = 2**20
_ROWS = 1024


class CorpusDigest:
    """A hash that grows with what is read of a corpus."""

    def __init__(self, folder: Path) -> None:
        """Start empty; relative paths start from `folder`."""
        self._folder, self._hash = folder, hashlib.blake2b(digest_size=16)

    def value(self) -> str:
        """The hash so far, in hexadecimal digits."""
        return self._hash.hexdigest()

    def add(self, text: str) -> None:
        """Count a text."""
        self._hash.update(f"{len(text)}:{text}".encode(errors="surrogateescape"))

    def add_file(self, path: Path) -> None:
        """Count the bytes of a file; its name does not count."""
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                self._hash.update(piece)

    def add_facts(self, path: Path) -> None:
        """Count name, size and time of a file."""
        try:
            facts = path.stat()
            name = path.relative_to(self._folder) if path.is_relative_to(self._folder) else path
            self.add(f"{name} {facts.st_size} {facts.st_mtime_ns}")
        except (OSError, ValueError):  # missing, or no path at all: the row's own reason says so
            self.add("nothing")

    def add_media_of(self, record: dict[str, Any]) -> None:
        """Count the media files that a record names."""
        for kind in _MEDIA:
            for name in _names(record.get(kind)):
                self._add_named(name)

    def add_media_of_parquet(self, path: Path, beside: Path = Path()) -> None:
        """Count the media files that a Parquet file names; bytes in the table are not read again.

        `beside` leads from the folder where paths start to that of the file.
        """
        with pq.ParquetFile(path) as file:
            # The leaves of a column of paths, of structs (`bytes`, `path`), of lists of either; without stored bytes.
            leaves = [file.schema.column(number) for number in range(len(file.schema.names))]
            texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
            named = [leaf for leaf in texts if leaf.split(".")[0] in _MEDIA]
            for column in named:
                for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                    self._add_column(batch.column(0), beside)

    def add_media_of_table(self, table: Dataset) -> None:
        """Count the media files that a data set on this machine names."""
        for kind in _MEDIA:
            if kind in table.column_names:
                for part in table.select_columns([kind]).with_format("arrow").iter(_ROWS):
                    self._add_column(part.column(0).combine_chunks())

    def _add_column(self, column: pa.Array, beside: Path = Path()) -> None:
        if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
            column = pc.struct_field(column, "path")  # the stored bytes are not taken out
        for value in column.to_pylist():
            for name in _names(value):
                self._add_named(name, beside)

    def _add_named(self, name: Any, beside: Path = Path()) -> None:
        # An empty cell of a CSV file names nothing; as a path it would be the folder, which changes with every file.
        if isinstance(name, str) and 0 < len(name) < 4096 and not name.startswith(ADDRESSES):
            self.add_facts(self._folder / beside / name)


def _names(value: Any) -> Iterator[Any]:
    """Paths in a cell: of a path, of a stored image, of a list of them, however the column is stored."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        yield value.get("path")
    else:
        yield value
