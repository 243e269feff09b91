"""The leaderboard's further metrics, by hand."""

from __future__ import annotations

import math

import pytest

from evaluation.ranking_metrics import leaderboard_metrics, official_ndcg


def test_one_query_by_hand():
    relevant = {"q": {"a": 3, "b": 1}}
    found = leaderboard_metrics(relevant, {"q": {"x": 0.9, "b": 0.8, "y": 0.7, "a": 0.6, "z": 0.1}})
    gained = 1 / math.log2(3) + 7 / math.log2(5)
    assert found["ndcg_exponential_at_5"] == pytest.approx(gained / (7 + 1 / math.log2(3)))
    assert found["ndcg_exponential_at_1"] == found["f1_at_1"] == found["map_official_at_1"] == 0
    precision, recall = 2 / 5, 2 / 2
    assert found["f1_at_5"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["map_official_at_5"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_map_is_taken_over_what_could_be_found():
    """Three right documents, one looked at: the official form gives 1, mteb's 1/3."""
    found = leaderboard_metrics({"q": {"a": 1, "b": 1, "c": 1}}, {"q": {"a": 1.0, "b": 0.9}})
    assert found["map_official_at_1"] == 1 and found["f1_at_1"] == pytest.approx(2 / 4)


def test_queries_are_averaged_and_a_missing_one_counts_zero():
    found = leaderboard_metrics({"q": {"a": 1}, "r": {"a": 1}}, {"q": {"a": 1.0}})
    assert found["map_official_at_5"] == found["ndcg_exponential_at_5"] == 0.5
    assert [found[f"f1_at_{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 2, 1 / 6, 1 / 11])


def test_equal_grades_make_both_forms_of_ndcg_equal_and_ties_go_by_id():
    found = leaderboard_metrics({"q": {"b": 1}}, {"q": {"a": 0.5, "b": 0.5}})
    assert found["ndcg_exponential_at_1"] == 1, "b is ranked before a"


def test_the_harness_puts_mixed_grades_on_the_wrong_documents():
    """Labels 5, 3 leave a set as 3, 5 and meet the grades 1, 2 in the old order: a perfect ranking scores 0.860."""
    relevant = {"q": {"p5": 1, "p3": 2}}
    perfect = {"q": {"p3": 0.9, "p5": 0.8, "p1": 0.1}}
    assert official_ndcg(relevant, perfect) == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))
    assert round(official_ndcg(relevant, perfect), 3) == 0.860
    assert official_ndcg({"q": {"p3": 2, "p5": 1}}, perfect) == 1, "an order that the set keeps does no harm"


def test_there_is_no_other_number_for_equal_grades_and_none_to_repeat_for_names():
    assert official_ndcg({"q": {"p5": 2, "p3": 2}, "r": {"p1": 1}}, {}) is None
    assert official_ndcg({"q": {"page-a": 1, "page-b": 2}}, {}) is None
