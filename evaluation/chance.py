"""The score of a model that ranks at random: exact, from the data alone."""

from __future__ import annotations

import math

from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData


def chance_level(data: RetrievalSplitData, metric: str) -> float:
    """Expected score of a uniformly random ranking.

    A query with N candidates and grades g ranks each grade equally often at each place, so
    hit@1 = |g| / N and nDCG@5 = (sum(g) / N) * sum_{r=1..min(5, N)} 1 / log2(r + 1) / IDCG.

    Args:
        data: Queries, corpus, relevance and, for local candidates, the lists.
        metric: `hit@1` or `ndcg_linear@5`.

    Returns:
        Mean over the queries, in [0, 1].

    Raises:
        ValueError: Unknown metric.
    """
    if metric not in ("hit@1", "ndcg_linear@5"):
        raise ValueError(f"chance is known for hit@1 and ndcg_linear@5, got {metric!r}")
    total = 0.0
    for query_id, grades in data["relevant_docs"].items():
        listed = data["top_ranked"][query_id] if data["top_ranked"] else None
        size = len(data["corpus"] if listed is None else listed)
        # a right candidate outside the query's own list (MVBench has some) can't be hit
        found = grades if listed is None else {document: grades[document] for document in grades if document in listed}
        gains = sorted(found.values(), reverse=True)
        if metric == "hit@1":
            total += len(gains) / size
            continue
        ideal = sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:5]))
        discounts = sum(1 / math.log2(place + 2) for place in range(min(5, size)))
        total += sum(gains) / size * discounts / ideal
    return total / len(data["relevant_docs"])
