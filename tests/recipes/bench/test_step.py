"""The benchmark's ways do the same work: equal values and gradients wherever they claim the same loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recipes.bench.settings import BenchmarkConfig
from recipes.bench.step import WAYS, backbone, batch, make_step, measure_together, table

CONFIG = BenchmarkConfig(batch_size=4, mini_batch_size=2, vocab_size=400, hidden_size=192, target_words=2, rounds=2)


@pytest.fixture(scope="module", params=["qwen2_vl", "llama"])
def runs(request):
    """Value and gradients of every way on one batch."""
    found = {}
    for way in WAYS:
        model = backbone(CONFIG, request.param).eval()
        value = make_step(CONFIG, model, way)(batch(CONFIG, model, request.param))
        value.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[way] = value.item(), grads
    return found


def test_same_loss(runs):
    value, grads = runs["btok"]
    for way in ("one width", "cached", "frozen"):
        assert runs[way][0] == pytest.approx(value, abs=1e-4)
    for way in ("one width", "cached"):
        assert runs[way][1].keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(runs[way][1][name], grad, atol=1e-4, rtol=1e-3, msg=f"{way} {name}")
    missing = grads.keys() - runs["frozen"][1].keys()
    assert len(missing) == 1 and "embed_tokens" in missing.pop()


def test_ranking_alone(runs):
    assert runs["cached mnrl"][0] == pytest.approx(runs["mnrl"][0], abs=1e-5)
    assert runs["btok"][0] > runs["mnrl"][0] + 0.5


def test_naive_ways_read_the_same_targets_without_a_mask(runs):
    """Weight 1 for the term, and random weights: a token costs about log(V) nats."""
    for way in ("explained", "naive"):
        assert runs[way][0] - runs["mnrl"][0] == pytest.approx(5 * (runs["btok"][0] - runs["mnrl"][0]), rel=0.1)
    assert runs["explained"][0] == pytest.approx(runs["naive"][0], abs=1e-4)


def test_table_pairs_rounds():
    numbered = list(enumerate(WAYS, start=1))
    rounds = [
        {way: {"seconds": [seconds * scale], "peak": 10.0, "tokens": 5, "targets": 3} for seconds, way in numbered}
        for scale in (1.0, 3.0)
    ]
    row = next(line for line in table(rounds, CONFIG, "llama").splitlines() if line.startswith("| btok"))
    assert row.split("|")[2:5] == [" 3.00 (3.00 to 3.00) ", " 1.50 (1.50 to 1.50) ", " 0.50 (0.50 to 0.50) "]


def test_time_alone_is_taken_in_one_process():
    config = replace(CONFIG, memory=False, rounds=1)
    rounds = measure_together(config, "llama")
    assert len(rounds) == 1 and rounds[0].keys() == set(WAYS)
    rows = table(rounds, config, "llama")
    assert "nan" not in rows and "| mnrl | 1.00 (1.00 to 1.00) |" in rows
