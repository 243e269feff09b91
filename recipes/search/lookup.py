"""One query: from what a person gives to the hits, and how a hit is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from recipes.data.searches import NOT_FINITE
from recipes.search.store import Hit, Store
from st_btok import encode_checked

# Random pairs of other files whose median similarity is above this are hardly told apart.
HARDLY_APART = 0.9
_SAMPLE, _FEWEST = 200, 20


@dataclass(frozen=True)
class Spread:
    """How similar random items of an index are, of different files: what a similarity means with this model here.

    Attributes:
        median: Half of the random pairs are more similar.
        high: One random pair of 20 is more similar; so is a hit that says something.
    """

    median: float
    high: float

    @property
    def warning(self) -> str:
        """What a person should know of the model before the first search; usually nothing."""
        if self.median < HARDLY_APART:
            return ""
        return (
            f"This model hardly tells these files apart: two random ones have a similarity of {self.median:.3f} "
            f"(1: the same). It was probably made for other files (the quickstart's is made for drawn words "
            "only). Take a model trained on files like yours."
        )


def spread(store: Store) -> Spread | None:
    """How similar random rows are, from at most 200; None if fewer than 20 pairs are of different files."""
    rows = store.sample(_SAMPLE)
    if len(rows) < 2:
        return None
    vectors = np.stack([vector for _, vector in rows])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    paths = np.array([path for path, _ in rows])
    pairs = (vectors @ vectors.T)[np.triu(paths[:, None] != paths, 1)]
    if len(pairs) < _FEWEST:
        return None
    return Spread(float(np.median(pairs)), float(np.quantile(pairs, 0.95)))


def query_of(text: str | None, image: str | Path | None) -> Any:
    """The model's input for a text, a picture's file, or both (picture first, as the recipes train it).

    The text is never taken for a path. The picture's bytes are handed on, so that no message names where the server
    keeps it.

    Raises:
        ValueError: If there is neither, or no such file.
    """
    given: dict[str, Any] = {}
    if image:
        try:
            given["image"] = Path(image).read_bytes()
        except OSError as error:
            raise ValueError(f"the picture {Path(image).name!r} can't be read: {error.strerror}.") from None
    if (text or "").strip():
        given["text"] = (text or "").strip()
    if not given:
        raise ValueError("a query must have a text or a picture, got neither.")
    return given


def find(
    store: Store,
    model: SentenceTransformer,
    value: Any,
    limit: int = 10,
    kinds: Sequence[str] = (),
    path: str = "",
) -> list[Hit]:
    """The items nearest to a query, best first; only of some kinds, or below a path, if given.

    The query, from `query_of`, goes through the checked reader, so an upload can't harm.

    Raises:
        ValueError: If the query can't be read, or its vector is not finite.
    """
    result = encode_checked(model, [value], "skip", task="query", show_progress_bar=False)
    if result.skipped:
        raise ValueError(f"the query can't be read: {result.skipped[0].reason}.")
    vector = np.asarray(result.embeddings[0], dtype=np.float32)
    if not np.isfinite(vector).all():
        raise ValueError(f"the query can't be searched with: {NOT_FINITE}.")
    return store.search(vector, limit, kinds, path)


def shown(hit: Hit) -> dict[str, Any]:
    """A hit as plain values."""
    row = hit.row
    return {"score": round(hit.score, 4), **{key: row[key] for key in ("path", "place", "kind", "text")}}


def line(hit: Hit) -> str:
    """A hit on one line."""
    row = hit.row
    text = " ".join(row["text"].split())[:80]
    return f"{hit.score:6.3f}  {row['path']} {row['place']}  {text}".rstrip()
