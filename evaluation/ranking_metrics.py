"""What the leaderboard's file holds beside mteb's scores: nDCG with exponential gain, F1, and its own form of MAP.

The definitions are those of the official evaluator (github TIGER-AI-Lab/VLM2Vec, commit 6e1e1d4). None of them decides
a rank on the leaderboard; hit@1 and the linear nDCG@5 do, and those are mteb's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

CUTOFFS = (1, 5, 10)


def leaderboard_metrics(
    relevant: Mapping[str, Mapping[str, int]], results: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Means over the queries, at 1, 5 and 10.

    With r_i the grade of the i-th result, h_k the number of right ones among the first k and g that of all right ones:
    nDCG = sum_{i<=k} (2^r_i - 1) / log2(i + 1), divided by the same of the best order; F1 = 2 h_k / (k + g);
    AP = the mean of h_i / i over the right results i <= k, taken over min(g, k) of them (mteb divides by g).

    Args:
        relevant: Query -> document -> grade, at least 1.
        results: Query -> document -> score; equal scores are ranked by id, from behind, as mteb does.

    Returns:
        `ndcg_exponential_at_k`, `f1_at_k` and `map_official_at_k` for each cutoff.
    """
    values: dict[str, list[float]] = {}
    for query, grades in relevant.items():
        scores = results.get(query, {})
        ranked = sorted(scores, key=lambda document: (scores[document], document), reverse=True)
        gains = [grades.get(document, 0) for document in ranked]
        for k in CUTOFFS:
            found = {
                f"ndcg_exponential_at_{k}": _gain(gains[:k]) / _gain(sorted(grades.values(), reverse=True)[:k]),
                f"f1_at_{k}": 2 * sum(gain > 0 for gain in gains[:k]) / (k + len(grades)),
                f"map_official_at_{k}": _precision(gains[:k]) / min(len(grades), k),
            }
            for name, value in found.items():
                values.setdefault(name, []).append(value)
    return {name: fmean(found) for name, found in values.items()}


def _gain(grades: Sequence[int]) -> float:
    return sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(grades))


def _precision(grades: Sequence[int]) -> float:
    """Sum of the precisions at the right results."""
    right = [place for place, grade in enumerate(grades, start=1) if grade > 0]
    return sum(count / place for count, place in enumerate(right, start=1))
