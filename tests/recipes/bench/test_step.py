"""The benchmark's ways do the same work: equal values and gradients wherever they claim the same loss."""

from __future__ import annotations

import pytest
import torch

from recipes.bench.settings import BenchmarkConfig
from recipes.bench.step import WAYS, OneWidth, backbone, batch, make_step, table, total
from st_btok import BTokLoss

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
    for way in ("cached", "frozen"):
        assert runs[way][0] == pytest.approx(value, abs=1e-4)
    assert runs["cached"][1].keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(runs["cached"][1][name], grad, atol=1e-4, rtol=1e-3, msg=name)
    missing = grads.keys() - runs["frozen"][1].keys()
    assert len(missing) == 1 and "embed_tokens" in missing.pop()


def test_ranking_alone(runs):
    assert runs["cached mnrl"][0] == pytest.approx(runs["mnrl"][0], abs=1e-5)
    assert runs["btok"][0] > runs["mnrl"][0] + 0.5


def test_the_explained_way_reads_the_same_targets_without_a_mask(runs):
    """Weight 1 for the condensation loss, and random weights: a token costs about log(V) nats."""
    assert runs["explained"][0] - runs["mnrl"][0] == pytest.approx(5 * (runs["btok"][0] - runs["mnrl"][0]), rel=0.1)


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_one_call_per_column_is_the_same_loss(family):
    model = backbone(CONFIG, family).eval()
    loss = OneWidth(model)
    columns = batch(CONFIG, model, family)
    assert total(loss([dict(c) for c in columns])).item() == pytest.approx(
        total(BTokLoss(model)(columns)).item(), abs=1e-4
    )


def test_table_pairs_rounds():
    numbered = list(enumerate(WAYS, start=1))
    rounds = [
        {way: {"seconds": [seconds * scale], "peak": 10.0, "tokens": 5, "targets": 3} for seconds, way in numbered}
        for scale in (1.0, 3.0)
    ]
    row = next(line for line in table(rounds, CONFIG, "llama").splitlines() if line.startswith("| btok"))
    assert row.split("|")[2:5] == [" 3.00 (3.00 to 3.00) ", " 1.50 (1.50 to 1.50) ", " 0.60 (0.60 to 0.60) "]
