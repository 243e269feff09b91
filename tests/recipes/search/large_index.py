"""An index large enough to be approximate, built once: `python -m tests.recipes.search.large_index [ROWS [TOPICS]]`.

Unit vectors of 384 dimensions around 2,000 topics, or with 0 topics of random directions, the worst case; the queries
are rows with noise. Prints how many of the ten nearest rows the index finds, and what a query takes with and without
it. Minutes of two cores go into building.
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np

from recipes.search.index import INDEX_ABOVE
from recipes.search.store import LanceStore

DIMENSION, QUERIES, AT_ONCE = 384, 100, 5000
ROW = {"path": "a", "kind": "text", "place": "", "text": "", "content": "", "last": 0, "size": 1, "changed": 1}


def noise(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.standard_normal((rows, DIMENSION), dtype=np.float32)


def main(rows: int, topics: int) -> None:
    """Build, search, compare."""
    rng = np.random.default_rng(0)
    if topics:
        vectors = noise(rng, topics)[rng.integers(0, topics, rows)] + 0.6 * noise(rng, rows)
    else:
        vectors = noise(rng, rows)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        store = LanceStore(folder, DIMENSION)
        for start in range(0, rows, AT_ONCE):
            part = range(start, min(start + AT_ONCE, rows))
            store.add([{**ROW, "id": f"{i:032x}", "part": i, "thumbnail": b""} for i in part], vectors[part])
        began = time.perf_counter()
        recall = store.finish(INDEX_ABOVE)
        print(f"{rows} rows, index built in {time.perf_counter() - began:.0f} s, recall@10 on build {recall}")
        queries = vectors[rng.integers(0, rows, QUERIES)] + 0.3 * noise(rng, QUERIES) / DIMENSION**0.5
        found = {}
        for exact in (True, False):
            began = time.perf_counter()
            hits = [store._search(query, 10, (), "", exact) for query in queries]
            print(f"exact={exact}: {1e3 * (time.perf_counter() - began) / QUERIES:.0f} ms a query")
            found[exact] = [{hit.row["id"] for hit in ten} for ten in hits]
        shares = [len(true & near) / 10 for true, near in zip(found[True], found[False], strict=True)]
        print(f"recall@10 of {QUERIES} other queries {np.mean(shares):.3f}")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(120_000, 2000)[len(given) :])
