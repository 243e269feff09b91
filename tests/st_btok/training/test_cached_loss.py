"""`CachedBTokLoss` = `BTokLoss` (invariant 6), for any mini-batch size, mix of media, route and option."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss, MatryoshkaLoss

from st_btok import BTokCallback, BTokLoss, CachedBTokLoss, build_model
from st_btok.training.vocabulary_loss import sum_with_gradients
from tests.backbones import build, picture, total
from tests.losses import assert_same, assert_same_gradients, columns, gradients, run


@pytest.mark.parametrize("mini_batch_size", [1, 3, 100])
def test_equals_the_plain_loss(model, family, mini_batch_size):
    """Invariant 6, over every family: rows with no, one and several media, of every kind it takes."""
    if family == "qwen3_5":  # its gated delta rule amplifies rounding: gradients of 1e2 differ by 1e-3 in fp32
        model.double()
    features = columns(model, family)
    expected = run(BTokLoss(model), features)
    assert_same(run(CachedBTokLoss(model, mini_batch_size=mini_batch_size), features), expected, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(qwen, side):
    qwen.tokenizer.padding_side = side
    features = columns(qwen, "qwen2_vl")
    assert_same(run(CachedBTokLoss(qwen, mini_batch_size=2), features), run(BTokLoss(qwen), features))


@pytest.mark.parametrize(
    "options",
    [
        {"route": "kv"},
        {"route": "prefix"},
        {"btok_budgets": (1, 2, 4)},
        {"false_negative_margin": 0.01},
        {"target": "both", "condensation_weight": 0.3, "max_target_tokens": 4},
        {"target": "none"},
        {"condensation_weight": 0.0},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    ],
    ids=str,
)
def test_every_option_passes_through(qwen, options):
    features = columns(qwen, "qwen2_vl")
    expected = run(BTokLoss(qwen, **options), features)
    assert_same(run(CachedBTokLoss(qwen, mini_batch_size=2, **options), features), expected)


def with_dropout():
    backbone, processor = build("llama")
    backbone.config.attention_dropout = 0.3
    return build_model(backbone, processor=processor, device="cpu").train()


def test_dropout_is_replayed():
    """The second pass must draw the masks of the first: one mini-batch of all rows then equals the plain loss."""
    model = with_dropout()
    features = columns(model, "llama")[:2]  # the plain loss merges a third column with the second

    expected = run(BTokLoss(model), features)
    assert_same(run(BTokLoss(model), features), expected)
    assert_same(run(CachedBTokLoss(model, mini_batch_size=3), features), expected)
    split = run(CachedBTokLoss(model, mini_batch_size=1), features)
    assert abs(split.total - expected.total) > 1e-4, "other masks: dropout is really on"


def test_gradients_belong_to_the_logged_loss():
    """Dropout on: a finite difference of the loss, at fixed masks, is the gradient that the second pass gives."""
    model = with_dropout().double()
    features = columns(model, "llama")
    grads = run(CachedBTokLoss(model, mini_batch_size=2), features).grads
    name = next(n for n in grads if n.endswith("layers.1.mlp.down_proj.weight"))
    parameter = dict(model.named_parameters())[name]
    step = 1e-3 * torch.randn_like(parameter)

    def value():
        torch.manual_seed(3)
        return total(CachedBTokLoss(model, mini_batch_size=2)([dict(c) for c in features])).item()

    with torch.no_grad():
        parameter += step
        above = value()
        parameter -= 2 * step
        below = value()
        parameter += step
    assert (above - below) / 2 == pytest.approx(float((grads[name] * step).sum()), rel=2e-2)


def test_rows_without_any_target(qwen):
    """Mini-batches without a target among others with one, and a batch without any."""
    features = [qwen.preprocess(["a", "b", "c", "d"]), qwen.preprocess(["", "", "target", ""])]
    expected = run(BTokLoss(qwen), features)
    assert_same(run(CachedBTokLoss(qwen, mini_batch_size=1), features), expected)
    empty = [qwen.preprocess([picture(28, 28, i) for i in range(2)]), qwen.preprocess(["", ""])]
    assert_same(run(CachedBTokLoss(qwen, mini_batch_size=1), empty), run(BTokLoss(qwen), empty))


def test_evaluation_without_gradients(qwen):
    features = columns(qwen, "qwen2_vl")
    with torch.no_grad():
        found = CachedBTokLoss(qwen, mini_batch_size=2)([dict(c) for c in features])
        expected = BTokLoss(qwen)([dict(c) for c in features])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- loss modifiers: the ranking part per dimension or layer, the condensation loss once ----------------------------


def matryoshka_reference(model, features, dims, weights):
    """Sum of weighted ranking parts on truncated embeddings, plus the condensation loss once."""
    own = BTokLoss(model, condensation_weight=1.0)
    parts = own([dict(c) for c in features])
    embeddings = [model(dict(c))["sentence_embedding"] for c in features]
    ranking = sum(
        weight * own.ranking.compute_loss_from_embeddings([e[:, :dim] for e in embeddings], None)
        for dim, weight in zip(dims, weights, strict=True)
    )
    return ranking, parts["condensation"]


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_trains_the_term_once(qwen, cached):
    features = columns(qwen, "qwen2_vl")
    dims, weights = [32, 16, 8], [1.0, 0.5, 0.25]
    kind = CachedBTokLoss if cached else BTokLoss
    inner = kind(qwen, condensation_weight=1.0, **({"mini_batch_size": 2} if cached else {}))
    loss = MatryoshkaLoss(qwen, inner, matryoshka_dims=dims, matryoshka_weights=weights)
    qwen.zero_grad()
    value = total(loss([dict(c) for c in features], None))
    value.backward()
    grads = gradients(qwen)
    qwen.zero_grad()
    ranking, condensation = matryoshka_reference(qwen, features, dims, weights)
    (ranking + condensation).backward()
    torch.testing.assert_close(value.detach(), (ranking + condensation).detach(), atol=1e-4, rtol=1e-5)
    measured = getattr(inner, "loss", inner).measured
    torch.testing.assert_close(measured.nll, condensation.detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients(grads, gradients(qwen), atol=2e-5)


def test_matryoshka_with_budgets(qwen):
    features = columns(qwen, "qwen2_vl")
    values = []
    for inner in (BTokLoss(qwen, btok_budgets=(1, 4)), CachedBTokLoss(qwen, btok_budgets=(1, 4), mini_batch_size=2)):
        loss = MatryoshkaLoss(qwen, inner, matryoshka_dims=[32, 8])
        values.append(total(loss([dict(c) for c in features], None)).detach())
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("route", ["attention", "prefix"])
def test_matryoshka2d_trains_the_term_once(route):
    """Text-only: sentence-transformers 6.2 gets no states of single layers out of a multimodal backbone."""
    backbone, processor = build("llama")
    model = build_model(backbone, processor=processor, device="cpu")
    features = columns(model, "llama")
    inner = BTokLoss(model, route=route)
    own = inner([dict(c) for c in features])
    nll, tokens = inner.measured.nll, inner.measured.tokens
    loss = Matryoshka2dLoss(model, inner, matryoshka_dims=[32, 16], n_layers_per_step=-1, n_dims_per_step=-1)
    value = loss([dict(c) for c in features], None)
    torch.testing.assert_close(inner.measured.nll, nll, atol=1e-5, rtol=1e-5)
    assert inner.measured.tokens == tokens
    assert value > own["ranking"] + own["condensation"]
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# --- memory, training, errors ----------------------------------------------------------------------------------------


def test_only_one_mini_batch_is_alive(qwen, monkeypatch):
    """The largest call of model and LM head does not grow with the batch."""
    rows, logits = [], []
    qwen[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0]["input_ids"])))

    def watched(states, *rest, **options):
        logits.append(len(states))
        return sum_with_gradients(states, *rest, **options)

    monkeypatch.setattr("st_btok.training.vocabulary_loss.sum_with_gradients", watched)
    largest = []
    for size in (4, 16):
        rows.clear()
        logits.clear()
        features = [qwen.preprocess([f"query {i % 10}" for i in range(size)]), qwen.preprocess(["target"] * size)]
        total(CachedBTokLoss(qwen, mini_batch_size=2)(features)).backward()
        largest.append((max(rows), max(logits)))
    assert largest[0] == largest[1] and largest[0][0] == 2


def test_training_logs_both_parts(qwen, tmp_path):
    data = Dataset.from_dict({"query": [f"q{i % 4}" for i in range(16)], "positive": ["red", "blue", "grey", "x"] * 4})
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=8, learning_rate=5e-3, logging_steps=2,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    loss = CachedBTokLoss(qwen, mini_batch_size=3, condensation_weight=1.0)
    trainer = SentenceTransformerTrainer(
        model=qwen, args=args, train_dataset=data, loss=loss, callbacks=[BTokCallback()]
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "ranking" in entry]
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"] and logs[-1]["condensation"] < logs[0]["condensation"]
    assert logs[0]["loss"] == pytest.approx(logs[0]["ranking"] + logs[0]["condensation"], rel=1e-3)
    assert logs[-1]["tokens_per_second"] > 0 and logs[0]["condensation_leak"] == 0
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert CachedBTokLoss(qwen, mini_batch_size=3).get_config_dict()["mini_batch_size"] == 3
    assert "2604.11095" in loss.citation


def test_bad_sizes_are_refused(qwen):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        CachedBTokLoss(qwen, mini_batch_size=0)


def test_columns_whose_names_begin_alike(qwen):
    """The Trainer gives `negative` the features of `negative_1` as well; they belong to no row and are left alone."""
    features = columns(qwen, "qwen2_vl")
    others = qwen.preprocess([picture(28, 28, 1), picture(28, 84, 2)])
    mixed = [{**column, **{f"1_{key}": value for key, value in others.items()}} for column in features]
    for loss in (BTokLoss(qwen), CachedBTokLoss(qwen, mini_batch_size=2)):
        assert_same(run(loss, mixed), run(loss, features))


def test_the_trainer_with_such_columns(qwen, tmp_path):
    pictures = [picture(28 + 28 * (i % 2), 28, i) for i in range(8)]
    data = Dataset.from_dict(
        {"query": ["a", "b"] * 4, "positive": ["red", "blue"] * 4, "negative": pictures, "negative_1": pictures[::-1]}
    ).cast_column("negative", Image()).cast_column("negative_1", Image())  # fmt: skip
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    loss = CachedBTokLoss(qwen, mini_batch_size=2)
    SentenceTransformerTrainer(model=qwen, args=args, train_dataset=data, loss=loss).train()
