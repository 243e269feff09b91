"""Intervals that hold for new seeds and queries, ranks by hand, the table."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy import stats

from recipes.data.searches import Search
from recipes.research.significance import Run, draw, paired_difference, queries_that_show, table, verdicts


def test_the_interval_of_one_seed_is_the_paired_t_interval():
    values = np.random.default_rng(0).normal(1, 2, (1, 40))
    expected = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    found = paired_difference(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired_difference(np.full((3, 5), 2.0)).low == 2.0


def coverage(interval, rng, rounds=600):
    """How often an interval holds the true difference 0, where three seeds and 60 queries both differ."""
    held = 0
    for _ in range(rounds):
        seeds, queries = rng.normal(0, 1, (3, 1)), rng.normal(0, 4, (1, 60))
        low, high = interval(seeds + queries + rng.normal(0, 4, (3, 60)))
        held += low <= 0 <= high
    return held / rounds


def test_the_interval_covers_where_a_bootstrap_over_three_seeds_does_not():
    rng = np.random.default_rng(1)

    def bootstrap(values):
        draws = []
        for _ in range(200):
            s, q = rng.integers(3, size=3), rng.integers(60, size=60)
            draws.append(values[s][:, q].mean())
        return np.percentile(draws, [2.5, 97.5])

    def ours(values):
        found = paired_difference(values)
        return found.low, found.high

    assert coverage(ours, rng) > 0.93
    assert coverage(bootstrap, rng, 300) < 0.90


class Points:
    """A model whose embeddings are given."""

    def __init__(self, queries, documents):
        self.vectors = {"query": np.array(queries, float), "document": np.array(documents, float)}

    def encode_query(self, batch, **options):
        return self.vectors["query"][batch]

    def encode_document(self, batch, **options):
        return self.vectors["document"][batch]


def test_ranks_take_the_best_right_document_and_count_ties_against_it():
    model = Points([[1, 0], [0, 1], [1, 1]], [[1, 0], [2, 0], [0, 1], [0, 1]])
    search = Search("s", range(3), range(4), [{0}, {3}, {0, 1}])
    # [1, 2, 0, 0], [0, 0, 1, 1], [1, 2, 1, 1]
    assert search.ranks(model).tolist() == [2, 2, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_have_no_rank(value):
    """Every comparison with NaN is false, so its queries would find what they look for at once."""
    good, bad = [[1, 0], [0, 1]], [[1, 0], [value, 1]]
    for model, side in ((Points(bad, good), "query"), (Points(good, bad), "document")):
        with pytest.raises(ValueError, match=rf"{side} 1 of 's' has NaN or infinity \(1 of 2 have\)"):
            Search("s", range(2), range(2), [{0}, {1}]).ranks(model)


def run(variant, seed, ranks):
    return Run(variant, seed, {"a → b": np.array([4, 4])}, {"a → b": np.array(ranks)}, 10, 0.5, 5.0, [{"loss": 1.0}])


def test_table_and_figure(tmp_path):
    runs = [run("btok", 0, [1, 1]), run("btok", 1, [1, 2]), run("lasttoken", 0, [2, 1]), run("lasttoken", 1, [2, 2])]
    text = table(runs, "lasttoken", {"a → b": 4})
    # MRR 100 and 75 against 75 and 50: the differences are 50, 0 and 50, 0
    interval = paired_difference(np.array([[50.0, 0.0], [50.0, 0.0]]))
    assert (
        f"| a → b | btok | 25.0 | 87.5 ± 12.5 | +25.0 ({interval.low:+.1f} to {interval.high:+.1f}) | 75.0 |" in text
    )
    assert "| a → b | lasttoken | 25.0 | 62.5 ± 12.5 |  | 25.0 | 100.0 | 10 | 0.50 |" in text
    assert f"| a → b | chance |  | {100 * np.mean([1, 1 / 2, 1 / 3, 1 / 4]):.1f} |  | 25.0 | 100.0 |  |  |" in text
    head = table(runs, "lasttoken", {"a → b": 4}, pairs=2).splitlines()[0]
    assert head == "2 held-out pairs; chance is MRR 52.1 among 4 candidates; 2 seeds."
    assert "seeds and queries" in text and "queries alone" in table(runs[::2], "lasttoken", {"a → b": 4})
    draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_runs_survive_a_line_of_json():
    before = run("btok", 0, [1, 2])
    after = Run.from_json(json.loads(json.dumps(before.to_json())))
    assert after.to_json() == before.to_json() and after.after["a → b"].tolist() == [1, 2]


def test_the_number_of_queries_shows_the_difference_in_four_of_five_comparisons():
    """Against a simulation: three seeds that differ, and so many queries, with a true difference of 3."""
    rng = np.random.default_rng(3)

    def comparison(queries, mean):
        return mean + rng.normal(0, 0.4, (3, 1)) + rng.normal(0, 12, (1, queries)) + rng.normal(0, 9, (3, queries))

    wanted = int(np.median([queries_that_show(comparison(60, 0), 3.0) or 0 for _ in range(200)]))
    shown = np.mean([paired_difference(comparison(wanted, 3.0)).low > 0 for _ in range(400)])
    assert 100 < wanted < 400 and 0.7 < shown < 0.9
    apart = np.array([[-9.0], [0.0], [9.0]]) + rng.normal(0, 1, (3, 500))
    assert queries_that_show(apart, 3.0) is None, "no number of queries makes up for seeds that differ"


def ranked(variant, seed, ranks):
    return Run(variant, seed, {"s": ranks}, {"s": ranks}, 1, 1.0, 1.0, [])


def test_the_verdict_says_better_worse_or_how_many_pairs_would_show_it():
    rng = np.random.default_rng(0)
    base = [rng.integers(1, 20, 60) for _ in range(3)]
    runs = [ranked("lasttoken", seed, ranks) for seed, ranks in enumerate(base)]
    runs += [ranked("best", seed, np.ones(60, int)) for seed in range(3)]
    runs += [ranked("worst", seed, np.full(60, 99)) for seed in range(3)]
    runs += [ranked("other", seed, rng.permutation(ranks)) for seed, ranks in enumerate(base)]
    best, worst, other = verdicts(runs, "lasttoken", pairs=60)
    assert best.startswith("best is better than lasttoken on 60 held-out pairs, 3 seeds: +")
    assert worst.startswith("worst is worse than lasttoken on 60 held-out pairs, 3 seeds: -")
    assert other.startswith("No difference shown between other and lasttoken with 60 held-out pairs, 3 seeds (")
    assert re.search(r"; about \d+0 pairs would show 3 points\.$", other)
