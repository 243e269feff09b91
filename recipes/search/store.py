"""Where rows live: a LanceDB table in a folder (or on object storage), searched exactly or through an index.

A store is any object with the methods of `Store`; `qdrant_store.py` is the other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import HnswSq

COLUMNS = ("id", "path", "kind", "place", "text", "content", "part", "last", "size", "changed", "thumbnail")


@dataclass(frozen=True)
class Hit:
    """One row found: its fields by name, without the vector, and its cosine similarity to the query."""

    score: float
    row: dict[str, Any]


class Store(Protocol):
    """What the index asks of a place for rows."""

    def files(self) -> dict[str, dict[str, Any]]:
        """By path: `size`, `changed` (ns), `content` (hash), `found` (parts that are there), `whole` (all of them)."""

    def add(self, rows: Sequence[dict[str, Any]], vectors: np.ndarray) -> None:
        """Write rows and their (N, D) vectors in one step: all of them or none."""

    def remove(self, paths: Sequence[str]) -> None:
        """Delete all rows of some files."""

    def count(self) -> int:
        """Number of rows."""

    def search(self, vector: np.ndarray, limit: int, kinds: Sequence[str] = (), path: str = "") -> list[Hit]:
        """The rows nearest to a (D,) vector by cosine; only of some kinds, or below a path, if given."""

    def vector(self, row_id: str) -> np.ndarray:
        """The (D,) stored vector of a row."""

    def sample(self, rows: int) -> list[tuple[str, np.ndarray]]:
        """Paths and (D,) vectors of at most so many rows, spread over the whole table."""

    def finish(self, index_above: int) -> float | None:
        """Tidy up after writing; above so many rows build an index. Returns its recall@10 against exact search."""


def files_of(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `Store.files` returns, from all rows; the row of a file's last part tells how many there are."""
    files: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = files.setdefault(row["path"], {**row, "found": set(), "total": None})
        entry["found"].add(row["part"])
        if row["last"]:
            entry["total"] = row["part"] + 1
    for entry in files.values():
        entry["whole"] = len(entry["found"]) == entry["total"]
    return files


class LanceStore:
    """Rows in LanceDB. Below `index_above` rows every search is exact.

    Args:
        uri: Folder, or `s3://...`, `gs://...`, `az://...`.
        dimension: D.
        half: Store vectors as float16 instead of float32: half the size, differences of about 1e-3 in the score.
    """

    def __init__(self, uri: str, dimension: int, half: bool = False) -> None:
        self.dtype = pa.float16() if half else pa.float32()
        self.schema = pa.schema(
            [(name, pa.string()) for name in COLUMNS[:6]]
            + [(name, pa.int64()) for name in COLUMNS[6:10]]
            + [("thumbnail", pa.binary()), ("vector", pa.list_(self.dtype, dimension))]
        )
        self.dimension = dimension
        database = lancedb.connect(uri)
        if "items" not in database.list_tables().tables:
            database.create_table("items", schema=self.schema, exist_ok=True)
        self.table = database.open_table("items")
        stored = self.table.schema.field("vector").type
        if stored != self.schema.field("vector").type:
            raise ValueError(
                f"the table in {uri} holds vectors of type {stored}, the model and settings given make "
                f"{self.schema.field('vector').type}. Index into another folder."
            )

    def files(self) -> dict[str, dict[str, Any]]:
        """See `Store`."""
        names = ["path", "size", "changed", "content", "part", "last"]
        batches = self.table.search().select(names).to_batches()
        return files_of(row for batch in batches for row in batch.to_pylist())

    def add(self, rows: Sequence[dict[str, Any]], vectors: np.ndarray) -> None:
        """See `Store`."""
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in COLUMNS}
        flat = pa.array(vectors.astype(self.dtype.to_pandas_dtype()).ravel())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, self.dimension)
        self.table.add(pa.table(columns, schema=self.schema))

    def remove(self, paths: Sequence[str]) -> None:
        """See `Store`."""
        for start in range(0, len(paths), 500):  # one condition over a million paths would be a very long statement
            self.table.delete(f"path IN ({', '.join(map(_quoted, paths[start : start + 500]))})")

    def count(self) -> int:
        """See `Store`."""
        return self.table.count_rows()

    def search(self, vector: np.ndarray, limit: int, kinds: Sequence[str] = (), path: str = "") -> list[Hit]:
        """See `Store`."""
        return self._search(vector, limit, kinds, path, exact=False)

    def vector(self, row_id: str) -> np.ndarray:
        """See `Store`."""
        rows = self.table.search().where(f"id = {_quoted(row_id)}").select(["vector"]).limit(1).to_list()
        if not rows:
            raise KeyError(f"no row {row_id!r} in the table; was its file deleted since?")
        return np.asarray(rows[0]["vector"], dtype=np.float32)

    def sample(self, rows: int) -> list[tuple[str, np.ndarray]]:
        """See `Store`."""
        count = self.count()
        step = max(count // rows, 1)
        if step == 1:
            found = self.table.search().select(["path", "vector"]).limit(min(count, rows) or 1).to_list()
        else:
            found = [
                self.table.search().select(["path", "vector"]).offset(number * step).limit(1).to_list()[0]
                for number in range(rows)
            ]
        return [(row["path"], np.asarray(row["vector"], dtype=np.float32)) for row in found]

    def finish(self, index_above: int) -> float | None:
        """See `Store`."""
        self.table.optimize()  # many small additions become few files, new rows enter an index that is there
        if self.count() <= index_above:
            return None
        if not self.table.list_indices():
            # int8 inside the index; what it finds is ranked again with the stored vectors (`refine_factor`).
            self.table.create_index("vector", config=HnswSq(distance_type="cosine"))
        return self._recall()

    def _recall(self, queries: int = 50, limit: int = 10) -> float:
        """Share of the exact ten nearest rows that the index finds, over rows drawn from the table itself."""
        shares = []
        for _, query in self.sample(queries):
            near = {hit.row["id"] for hit in self._search(query, limit, (), "", exact=False)}
            true = {hit.row["id"] for hit in self._search(query, limit, (), "", exact=True)}
            shares.append(len(near & true) / len(true))
        return float(np.mean(shares))

    def _search(self, vector: np.ndarray, limit: int, kinds: Sequence[str], path: str, exact: bool) -> list[Hit]:
        conditions = []
        if kinds:
            conditions.append(f"kind IN ({', '.join(map(_quoted, kinds))})")
        if path:
            conditions.append(f"starts_with(path, {_quoted(path)})")
        query = self.table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector")
        query = query.distance_type("cosine").limit(limit).select([*COLUMNS, "_distance"])
        query = query.bypass_vector_index() if exact else query.refine_factor(10)
        if conditions:
            query = query.where(" AND ".join(conditions), prefilter=True)
        rows = query.to_list()
        return [Hit(1 - row.pop("_distance"), row) for row in rows]


def _quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
