"""One query: from what a person gives to the hits, and how a hit is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from recipes.search.store import Hit, Store
from st_btok import encode_checked


def query_of(text: str | None, image: str | Path | None) -> Any:
    """The model's input for a text, a picture's file, or both (picture first, as the recipes train it)."""
    parts = {"image": str(image) if image else None, "text": (text or "").strip() or None}
    given = {key: value for key, value in parts.items() if value is not None}
    if not given:
        raise ValueError("a query must have a text or a picture, got neither.")
    return given["text"] if list(given) == ["text"] else given


def find(
    store: Store,
    model: SentenceTransformer,
    value: Any,
    limit: int = 10,
    kinds: Sequence[str] = (),
    path: str = "",
) -> list[Hit]:
    """The items nearest to a query.

    Args:
        store: From `open_index`.
        model: The model of the index.
        value: From `query_of`; it goes through the checked reader, so an upload can't harm.
        limit: Number of hits.
        kinds: Only items of these kinds; default all.
        path: Only items whose path starts with this.

    Returns:
        Hits, best first.

    Raises:
        ValueError: If the query can't be read.
    """
    result = encode_checked(model, [value], task="query", show_progress_bar=False)
    return store.search(np.asarray(result.embeddings[0], dtype=np.float32), limit, kinds, path)


def shown(hit: Hit) -> dict[str, Any]:
    """A hit as plain values."""
    row = hit.row
    return {"score": round(hit.score, 4), **{key: row[key] for key in ("path", "place", "kind", "text")}}


def line(hit: Hit) -> str:
    """A hit on one line."""
    row = hit.row
    text = " ".join(row["text"].split())[:80]
    return f"{hit.score:6.3f}  {row['path']} {row['place']}  {text}".rstrip()
