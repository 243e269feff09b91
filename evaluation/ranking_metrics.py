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
        ranked = _ranked(results.get(query, {}))
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


def official_ndcg(
    relevant: Mapping[str, Mapping[str, int]], results: Mapping[str, Mapping[str, float]], k: int = 5
) -> float | None:
    """The linear nDCG@k that the benchmark's harness prints, which differs from nDCG where grades are mixed.

    The harness de-duplicates the right documents through a set, which reorders them, and pairs them with the grades
    in the old order (`metrics.py:214` and `:183`), so a grade can land on another document: a perfect ranking of
    grades 1 and 2 scores 0.860. Whole numbers leave a set in an order that only depends on them, so the slip can be
    repeated; strings leave it in another order in every process, and then there is no number to repeat.

    Args:
        relevant: Query -> document -> grade, at least 1; documents as `p` and the corpus' own id.
        results: Query -> document -> score.
        k: Cutoff.

    Returns:
        Mean over the queries; `None` where every query has one grade only (the harness' number is then the nDCG), or
        where a document's id is no whole number.
    """
    if all(len(set(grades.values())) == 1 for grades in relevant.values()):
        return None
    values = []
    for query, grades in relevant.items():
        if not all(document[1:].isdigit() for document in grades):
            return None
        shuffled = list({int(document[1:]) for document in grades})
        misplaced = dict(zip(shuffled, grades.values(), strict=True))
        ranked = _ranked(results.get(query, {}))[:k]
        gains = [misplaced.get(int(document[1:]), 0) if document[1:].isdigit() else 0 for document in ranked]
        ideal = sorted(grades.values(), reverse=True)[:k]
        values.append(_linear(gains) / _linear(ideal))
    return fmean(values)


def _ranked(scores: Mapping[str, float]) -> list[str]:
    """Documents from the best to the worst; equal scores by id, from behind, as mteb ranks them."""
    return sorted(scores, key=lambda document: (scores[document], document), reverse=True)


def _linear(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(place + 2) for place, grade in enumerate(grades))


def _gain(grades: Sequence[int]) -> float:
    return sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(grades))


def _precision(grades: Sequence[int]) -> float:
    """Sum of the precisions at the right results."""
    right = [place for place, grade in enumerate(grades, start=1) if grade > 0]
    return sum(count / place for count, place in enumerate(right, start=1))
