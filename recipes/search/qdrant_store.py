"""The same store on Qdrant, for more than one machine: `QdrantStore(QdrantClient(url=...), "my-files", dimension)`."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models

from recipes.search.store import COLUMNS, Hit, files_of


class QdrantStore:
    """Rows in a Qdrant collection; see `Store` for what each method does.

    Qdrant has no transaction over points: a step that is cut short leaves some of its rows, which `files` shows as an
    incomplete file, and the next update adds the rest.

    Args:
        client: A client, local (`QdrantClient(path=...)`) or of a server.
        collection: Name of the collection; made if it is not there.
        dimension: D.
    """

    def __init__(self, client: QdrantClient, collection: str, dimension: int) -> None:
        self.client, self.collection = client, collection
        if not client.collection_exists(collection):
            vectors = models.VectorParams(size=dimension, distance=models.Distance.COSINE)
            client.create_collection(collection, vectors_config=vectors)
        found = client.get_collection(collection).config.params.vectors
        if not isinstance(found, models.VectorParams) or found.size != dimension:
            raise ValueError(f"the collection {collection!r} holds {found}, the model makes {dimension} dimensions.")

    def files(self) -> dict[str, dict[str, Any]]:
        """See `Store`."""
        return files_of(self._payloads())

    def add(self, rows: Sequence[dict[str, Any]], vectors: np.ndarray) -> None:
        """See `Store`."""
        points = []
        for row, vector in zip(rows, vectors, strict=True):
            payload = {name: row[name] for name in COLUMNS}
            payload["thumbnail"] = base64.b64encode(row["thumbnail"]).decode()
            points.append(models.PointStruct(id=_point_id(row["id"]), vector=vector.tolist(), payload=payload))
        self.client.upsert(self.collection, points, wait=True)

    def remove(self, paths: Sequence[str]) -> None:
        """See `Store`."""
        if paths:
            condition = models.FieldCondition(key="path", match=models.MatchAny(any=list(paths)))
            self.client.delete(
                self.collection, models.FilterSelector(filter=models.Filter(must=[condition])), wait=True
            )

    def count(self) -> int:
        """See `Store`."""
        return self.client.count(self.collection, exact=True).count

    def search(self, vector: np.ndarray, limit: int, kinds: Sequence[str] = (), path: str = "") -> list[Hit]:
        """See `Store`."""
        conditions: list[Any] = []
        if kinds:
            conditions.append(models.FieldCondition(key="kind", match=models.MatchAny(any=list(kinds))))
        if path:
            # Qdrant matches values, not their beginnings: the paths that begin so are looked up first.
            below = sorted({row["path"] for row in self._payloads() if row["path"].startswith(path)})
            conditions.append(models.FieldCondition(key="path", match=models.MatchAny(any=below)))
        found = self.client.query_points(
            self.collection,
            query=np.asarray(vector, dtype=np.float32).tolist(),
            query_filter=models.Filter(must=conditions) if conditions else None,
            limit=limit,
            with_payload=True,
        )
        return [Hit(point.score, self._row(point.payload or {})) for point in found.points]

    def vector(self, row_id: str) -> np.ndarray:
        """See `Store`."""
        found = self.client.retrieve(self.collection, [_point_id(row_id)], with_vectors=True)
        if not found:
            raise KeyError(f"no row {row_id!r} in the collection; was its file deleted since?")
        return np.asarray(found[0].vector, dtype=np.float32)

    def sample(self, rows: int) -> list[tuple[str, np.ndarray]]:
        """See `Store`."""
        drawn = models.SampleQuery(sample=models.Sample.RANDOM)
        found = self.client.query_points(
            self.collection, query=drawn, limit=rows, with_payload=True, with_vectors=True
        )
        return [((point.payload or {})["path"], np.asarray(point.vector, dtype=np.float32)) for point in found.points]

    def finish(self, index_above: int) -> float | None:
        """Nothing to do: the server builds its HNSW index by itself, above a threshold of its own."""
        return None

    def _payloads(self) -> Iterator[dict[str, Any]]:
        """The fields of all rows."""
        start = None
        while True:
            points, start = self.client.scroll(self.collection, limit=1000, offset=start, with_payload=True)
            for point in points:
                yield point.payload or {}
            if start is None:
                return

    @staticmethod
    def _row(payload: dict[str, Any]) -> dict[str, Any]:
        return {**payload, "thumbnail": base64.b64decode(payload["thumbnail"])}


def _point_id(row_id: str) -> str:
    """Qdrant takes integers and UUIDs as ids; a row's id has the 32 digits of one."""
    return str(uuid.UUID(hex=row_id))
