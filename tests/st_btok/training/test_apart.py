"""Targets read apart from the graph: the loss and every gradient are those of targets inside of it."""

from __future__ import annotations

import pytest
import torch

from st_btok import BTokLoss, CachedBTokLoss, btok_lora_config
from st_btok.training import apart
from st_btok.training.unread import Unread
from tests.backbones import inputs, picture, takes, total


@pytest.fixture
def always(monkeypatch):
    """Tiny models have fewer activations than parameters, so they would never be worth it."""
    monkeypatch.setattr(apart, "KEPT_BY_A_LAYER", 10**9)


@pytest.fixture
def reads(monkeypatch):
    """The number of rows of each part that was read apart."""
    found = []
    take = Unread.take

    def watched(self, rows):
        found.append(len(rows))
        return take(self, rows)

    monkeypatch.setattr(Unread, "take", watched)
    return found


def columns(model, family):
    queries = inputs(family)[:-1]
    positives = [f"target {i} " + "x" * 7 * i for i in range(len(queries))]
    if takes(family, "image"):
        positives[1] = picture(28, 28, 9)
    return [model.preprocess(rows) for rows in (queries, positives, [f"no {i}" for i in range(len(queries))])]


def run(loss, features, scale=1.0):
    loss.zero_grad()
    torch.manual_seed(3)
    parts = loss([dict(column) for column in features])
    (scale * total(parts)).backward()
    grads = {name: p.grad.clone() / scale for name, p in loss.named_parameters() if p.grad is not None}
    return {name: part.detach() for name, part in parts.items()}, {
        n.replace("loss.", "", 1): g for n, g in grads.items()
    }


def assert_same(found, expected, atol=2e-5):
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, atol=atol, rtol=1e-5)
    assert found[1].keys() == expected[1].keys() and len(expected[1]) > 5
    assert sum(grad.abs().sum() for grad in expected[1].values()) > 1e-2, "vacuous"
    for name, grad in expected[1].items():
        size = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found[1][name] / size, grad / size, atol=atol, rtol=0, msg=name)


def test_equals_targets_in_the_graph(model, family, always, reads, monkeypatch):
    """Every family, plain and under GradCache, from pictures and to them."""
    if family == "qwen3_5":
        model.double()
    features, options = columns(model, family), {"condensation_weight": 0.7}
    with monkeypatch.context() as without:
        without.setattr(apart, "KEPT_BY_A_LAYER", 0)
        expected = run(BTokLoss(model, **options), features)
        assert not reads
    assert_same(run(BTokLoss(model, **options), features), expected)
    if BTokLoss(model).reads_apart:
        assert sum(reads) == len(inputs(family)) - 1, "every row generates, one of them its query"
    else:
        assert not reads and family in ("qwen3_5", "mamba", "gemma2")
    for size in (1, 3):
        assert_same(run(CachedBTokLoss(model, mini_batch_size=size, **options), features), expected)


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
@pytest.mark.parametrize(
    "options",
    [{"target": "both", "max_target_tokens": 3}, {"route": "kv"}, {"condensation_btoks": 2}, {"btok_budgets": (1, 4)}],
    ids=str,
)
def test_every_option(qwen, always, reads, monkeypatch, kind, options):
    features = columns(qwen, "qwen2_vl")
    with monkeypatch.context() as without:
        without.setattr(apart, "KEPT_BY_A_LAYER", 0)
        expected = run(BTokLoss(qwen, **options), features)
    for scale in (1.0, 0.5, 1000.0):
        assert_same(run(kind(qwen, **options), features, scale), expected)
    assert reads


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_adapters_pay_by_themselves(qwen, reads, monkeypatch, kind):
    """Under LoRA little trains, so targets of usual length are read apart without being told; dropout is replayed."""
    torch.manual_seed(1)
    qwen.add_adapter(btok_lora_config(qwen, r=1, dropout=0.0, init_lora_weights=False))
    trained = sum(p.numel() for p in qwen.parameters() if p.requires_grad)
    rows = ["word " * 20] * 64
    features = [
        qwen.preprocess([f"{i}" for i in range(64)]),
        qwen.preprocess([f"{i} {row}" for i, row in enumerate(rows)]),
    ]
    found = run(kind(qwen), features)
    assert sum(reads) == 64 and trained > 100
    monkeypatch.setattr(apart, "KEPT_BY_A_LAYER", 0)
    assert_same(found, run(BTokLoss(qwen), features), atol=1e-4)


def test_a_head_of_the_loss_trains_along(always, reads, monkeypatch):
    from st_btok import build_model
    from tests.backbones import build

    backbone, processor = build("llama")
    model = build_model(backbone, processor=processor, device="cpu")
    head = torch.randn_like(backbone.get_input_embeddings().weight) / 8
    features = columns(model, "llama")
    options = {"lm_head": head, "train_lm_head": True}
    found = [run(kind(model, **options), features) for kind in (BTokLoss, CachedBTokLoss)]
    assert reads and found[0][1]["lm_head"].abs().sum() > 0
    monkeypatch.setattr(apart, "KEPT_BY_A_LAYER", 0)
    for one in found:
        assert_same(one, run(BTokLoss(model, **options), features))


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_backward_may_come_twice(qwen, always, reads, kind):
    features = columns(qwen, "qwen2_vl")
    expected = run(kind(qwen), features)[1]
    qwen.zero_grad()
    value = total(kind(qwen)([dict(column) for column in features]))
    value.backward(retain_graph=True)
    value.backward()
    assert reads
    for name, parameter in qwen.named_parameters():
        if parameter.grad is not None:
            size = max(1.0, expected["model." + name].abs().max().item())
            torch.testing.assert_close(parameter.grad / size, 2 * expected["model." + name] / size, atol=2e-5, rtol=0)


def test_under_gradcache_targets_are_read_once(qwen, always, monkeypatch):
    """Positions of the decoder: the sources twice, the targets once, and the last mini-batch not again."""
    features = [qwen.preprocess([f"query {i}" for i in range(4)]), qwen.preprocess([f"target {i}" for i in range(4)])]
    loss = CachedBTokLoss(qwen, mini_batch_size=2)
    seen = []
    decoder = qwen[0].model.get_decoder()
    decoder.register_forward_hook(lambda m, args, kwargs, out: seen.append(out[0].shape[:2]), with_kwargs=True)
    total(loss([dict(column) for column in features])).backward()
    width = features[0]["input_ids"].shape[1], features[1]["input_ids"].shape[1]
    generated = max(len(target) for target in loss.loss.targets(features)[1][0]) - 1
    query, target, positive = (2, width[0]), (2, generated), (2, width[1])
    # First pass: the queries, a positive mini-batch, all targets, the last mini-batch. Second: all but that one.
    assert seen == [query, query, positive, target, target, positive, query, query, positive]


def test_where_it_is_not_done(qwen, always, reads):
    features = columns(qwen, "qwen2_vl")
    loss = BTokLoss(qwen)
    with torch.no_grad():
        loss([dict(column) for column in features])
    with torch.autocast("cpu", torch.float16):
        assert loss.apart(loss.targets(features)[1]) is None
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    run(loss, features)
    assert BTokLoss(qwen, route="unmasked").apart(loss.targets(features)[1]) is None
    assert not reads
