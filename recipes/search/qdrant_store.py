"""The same store on Qdrant, for more than one machine.

A collection keeps its model and folder in its metadata, as an index in a folder does in a file:

    store = QdrantStore(QdrantClient(url=...), "my-files", model, folder)
    update(store, model, store.folder)
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from sentence_transformers import SentenceTransformer

from evaluation.embedding.fingerprint import fingerprint
from recipes.search.folder import need_folder
from recipes.search.store import COLUMNS, Hit, files_of


class QdrantStore:
    """Rows in a Qdrant collection; see `Store` for what each method does.

    Qdrant has no transaction over points: a step that is cut short leaves some of its rows, which `files` shows as an
    incomplete file, and the next update adds the rest.

    Args:
        client: A client, local (`QdrantClient(path=...)`) or of a server from 1.16 on.
        collection: Name of the collection; made if it is not there.
        model: The model that embeds queries and files. Its fingerprint is kept in the collection's metadata.
        folder: The folder, or table, that is indexed; needed for a new collection, and kept in its metadata too.

    Attributes:
        folder: Where the paths in it start from, or the table.

    Raises:
        ValueError: If there is no collection and no `folder`, or it was made with another model or folder.
    """

    def __init__(
        self, client: QdrantClient, collection: str, model: SentenceTransformer, folder: str | Path | None = None
    ) -> None:
        self.client, self.collection = client, collection
        identity = fingerprint(model)
        if not client.collection_exists(collection):
            if folder is None:
                raise ValueError(f"there is no collection {collection!r}. Pass the folder that it should index.")
            need_folder(folder)
            dimension = np.asarray(model.encode_query(["a"], show_progress_bar=False)).shape[1]
            vectors = models.VectorParams(size=dimension, distance=models.Distance.COSINE)
            known = {"model": identity, "folder": str(Path(folder).resolve())}
            client.create_collection(collection, vectors_config=vectors, metadata=known)
        found = client.get_collection(collection).config.metadata or {}
        if not {"model", "folder"} <= found.keys():
            raise ValueError(
                f"the collection {collection!r} does not say which model and folder it is of: it was made before this "
                "was kept, or by a server before Qdrant 1.16. Index into another collection, on a newer server."
            )
        if found["model"] != identity:
            raise ValueError(
                f"the collection {collection!r} was made with another model (fingerprint {found['model'][:12]}..., "
                f"now {identity[:12]}...): its vectors can't be compared with this one's. Index into another "
                "collection."
            )
        if folder is not None and Path(folder).resolve() != Path(found["folder"]):
            raise ValueError(
                f"the collection {collection!r} is of {found['folder']}, not of {folder}. Index into another "
                "collection."
            )
        self.folder = Path(found["folder"])

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
