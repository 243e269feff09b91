"""`BTokLoss`: its value against sentence-transformers' own loss and hand computation, and training end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image, Value
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_btok import BTokCallback, BTokLoss, CachedBTokLoss
from st_btok.model_parts import find_btoks, unwrap
from tests.backbones import picture, takes, total
from tests.losses import gradients, run

TEXTS = (["a", "bb", "what?"], ["one", "two", "three kittens"])


def columns(model, family):
    """A query and a positive column with media, both, and neither."""
    if not takes(family, "image"):
        queries, positives = TEXTS
    else:
        queries = [picture(), {"image": picture(28, 28), "text": "what?"}, "a text", picture(28, 56)]
        positives = ["red", "blue", picture(56, 56), picture(28, 28)]
    return [model.preprocess(queries), model.preprocess(positives)]


@pytest.mark.parametrize("options", [{}, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "joint"}])
def test_without_the_term_it_is_the_ranking_loss(model, family, options):
    """Invariant 10, value and gradients, explicit negatives included."""
    features = [*columns(model, family), model.preprocess(["n"] * (4 if takes(family, "image") else 3))]
    ranking = run(MultipleNegativesRankingLoss(model, scale=50.0, **options), features)
    expected, wanted = ranking.total, ranking.grads
    for loss in (BTokLoss(model, condensation_weight=0, **options), BTokLoss(model, target="none", **options)):
        step = run(loss, features)
        found = step.grads
        torch.testing.assert_close(step.total, expected, atol=1e-6, rtol=1e-6)
        assert found.keys() >= {name for name in wanted if "emb_layer" not in name} and len(found) > 5
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_the_parts_add_up(model, family):
    features = columns(model, family)
    losses = {weight: BTokLoss(model, condensation_weight=weight) for weight in (1.0, 0.5)}
    one, half = (loss(features) for loss in losses.values())
    assert type(one) is dict and list(one) == ["ranking", "condensation"], "the Trainer's own contract"
    torch.testing.assert_close(one["ranking"], half["ranking"])
    torch.testing.assert_close(one["condensation"], 2 * half["condensation"])
    assert one["condensation"] > 0
    expected = len("redbluea text" if takes(family, "image") else "onetwothree kittens") + 3
    for weight, loss in losses.items():
        assert loss.measured.tokens == expected and loss.measured.weight == weight
        torch.testing.assert_close(loss.measured.nll, one["condensation"].detach())


def test_rows_without_target_change_nothing(model, family):
    """Invariant 12: the condensation loss over a batch is the token mean over the rows that have a target."""
    if not takes(family, "image"):
        queries, positives = ["a", "b"], ["one", ""]
    else:
        queries, positives = ["a", picture()], ["one", picture(28, 28)]
    loss = BTokLoss(model)
    with_empty = loss([model.preprocess(queries), model.preprocess(positives)])
    tokens = loss.measured.tokens
    alone = loss([model.preprocess(queries[:1] * 2), model.preprocess(positives[:1] * 2)])
    torch.testing.assert_close(with_empty["condensation"], alone["condensation"], atol=1e-6, rtol=1e-6)
    assert 2 * tokens == loss.measured.tokens
    none = loss([model.preprocess(["", ""]), model.preprocess(["", ""])])
    assert none["condensation"] == 0 and loss.measured.tokens == 0


def test_the_term_trains_what_is_pooled(model, family):
    """The generative gradient reaches the BTok rows and, through the readout states, every layer."""
    loss = BTokLoss(model)
    parts = loss(columns(model, family))
    parts["condensation"].backward()
    transformer, ids = find_btoks(model)
    rows = transformer.model.get_input_embeddings().weight.grad
    assert (rows[ids].abs().sum(1) > 0).all()
    layers = [p.grad for n, p in model.named_parameters() if "layers.1" in n and "visual" not in n]
    assert layers and all(grad is not None and grad.abs().sum() > 0 for grad in layers)
    assert all(p.grad is None for p in model[1].parameters())


def test_per_dataset_sides(qwen):
    features = [qwen.preprocess(["query", "b"]), qwen.preprocess(["pos", "c"])]
    tokens = {}
    for side in ("query", "positive", "both", "none"):
        loss = BTokLoss(qwen, target=side)
        loss(features)
        tokens[side] = loss.measured.tokens
    assert tokens == {"query": 8, "positive": 6, "both": 14, "none": 0}


def test_negatives_generate_nothing(qwen):
    pair = [qwen.preprocess(["a", "b"]), qwen.preprocess(["one", "two"])]
    extra = qwen.preprocess(["negative one", "negative two"])
    loss = BTokLoss(qwen)
    torch.testing.assert_close(loss(pair)["condensation"], loss([*pair, extra])["condensation"])
    assert loss([*pair, extra])["ranking"] > loss(pair)["ranking"]


def test_rows_without_btoks_are_named(qwen):
    features = [qwen.preprocess(["a", "b"]), qwen.preprocess(["c", "d"])]
    features[1]["input_ids"][1, -1] = 5
    with pytest.raises(ValueError, match="row 1 of column 1 holds them"):
        BTokLoss(qwen)(features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "document"}, "target must be one of"),
        ({"max_target_tokens": 0}, "max_target_tokens must be at least 1"),
        ({"condensation_weight": -1.0}, "at least 0"),
        ({"scale": 0.0}, "Scale must be"),
        ({"condensation_steps": -1}, "condensation_steps must be at least 0"),
    ],
)
def test_bad_arguments_are_refused(qwen, options, message):
    with pytest.raises(ValueError, match=message):
        BTokLoss(qwen, **options)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("temperature", "Use scale, the inverse temperature"),
        ("mini_batch_size", "Use CachedBTokLoss"),
        ("condensation_wieght", "Use condensation_weight"),
        ("hardness_strenght", "Use hardness_strength"),
        ("xyz", "It has scale, condensation_weight, "),
    ],
)
def test_an_argument_that_no_loss_has_is_named(qwen, name, instead):
    with pytest.raises(ValueError, match=f"BTokLoss has no argument '{name}'. {instead}"):
        BTokLoss(qwen, **{name: 0.05})


def test_a_temperature_in_the_place_of_its_inverse_is_noticed(qwen, caplog):
    BTokLoss(qwen, scale=0.02)
    assert "for a temperature of 0.02 it is 50, got 0.02" in caplog.text


def test_a_row_without_a_value_is_named(qwen):
    BTokLoss(qwen)
    with pytest.raises(ValueError, match="row 1 of this batch is None"):
        qwen.preprocess(["a", None])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss_class", [BTokLoss, CachedBTokLoss])
def test_a_model_with_nothing_to_train_is_refused_at_its_first_batch(qwen, loss_class, checkpointing):
    """A loaded adapter is frozen: without the error GradCache runs all steps and moves nothing."""
    loss, features = loss_class(qwen.train()), columns(qwen, "qwen2_vl")
    if checkpointing:
        qwen.gradient_checkpointing_enable({"use_reentrant": False})
    qwen.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing would be trained.*requires_grad_"):
        loss(features)
    with torch.no_grad():
        loss(features)  # evaluation trains nothing anyway
    qwen[0].model.get_input_embeddings().requires_grad_(True)
    total(loss(features)).backward()


def test_config_and_citation_for_the_model_card(qwen):
    config = BTokLoss(qwen, condensation_weight=5.0, condensation_steps=2000).get_config_dict()
    assert config["condensation_weight"] == 5.0 and config["condensation_steps"] == 2000 and config["scale"] == 50.0
    json.dumps(config)
    assert "2604.11095" in BTokLoss(qwen).citation
    assert BTokLoss(qwen).temperature == 0.02
    assert BTokLoss(qwen, condensation_weight=half).get_config_dict()["condensation_weight"] == "half"


def half(step: int) -> float:
    return 0.5


def test_a_wrapped_model_is_found(qwen):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert unwrap(Wrapper(Wrapper(qwen))) is qwen


# --- the Trainer --------------------------------------------------------------------------------------------------


def dataset(size=16) -> Dataset:
    images = [picture(28, 28, i % 4) for i in range(size)]
    texts = [("red", "blue", "green", "grey")[i % 4] for i in range(size)]
    return Dataset.from_dict({"query": images, "positive": texts}).cast_column("query", Image())


def asked(size=16) -> Dataset:
    rows = [{"image": picture(28, 28, i % 4), "text": "what colour?"} for i in range(size)]
    data = Dataset.from_dict({"query": rows, "positive": ["red", "blue", "green", "grey"] * (size // 4)})
    return data.cast_column("query", {"image": Image(), "text": Value("string")})


def arguments(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 5e-3,
        "logging_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0,
    }  # fmt: skip
    return SentenceTransformerTrainingArguments(**{**defaults, **options})


def test_training_end_to_end(qwen, tmp_path):
    """Loss falls, both parts are logged, frozen weights stay, and the result loads plainly with equal embeddings."""
    weights = qwen[1].emb_layer.weight.clone()
    before = {name: p.detach().clone() for name, p in qwen.named_parameters()}
    loss = BTokLoss(qwen, condensation_weight=1.0)
    trainer = SentenceTransformerTrainer(
        model=qwen, args=arguments(tmp_path, prompts={"query": "Describe: "}), train_dataset=dataset(), loss=loss,
        callbacks=[BTokCallback()],
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "ranking" in entry]
    assert {"loss", "ranking", "condensation", "condensation_weight", "condensation_nll"} <= logs[0].keys()
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"] and logs[-1]["condensation"] < logs[0]["condensation"]
    assert logs[0]["loss"] == pytest.approx(logs[0]["ranking"] + logs[0]["condensation"], rel=1e-2)
    assert logs[0]["condensation_tokens"] == pytest.approx(19.5, abs=8)
    assert torch.equal(qwen[1].emb_layer.weight, weights)
    moved = [name for name, p in qwen.named_parameters() if not torch.equal(p, before[name])]
    assert any("embed_tokens" in name for name in moved) and any("visual" in name for name in moved)
    qwen.save_pretrained(str(tmp_path / "btok"))
    config = (tmp_path / "btok" / "config.json").read_text()
    assert "btok_condensation" not in config
    card = (tmp_path / "btok" / "README.md").read_text()
    assert "BTokLoss" in card and "condensation_weight" in card and "2604.11095" in card
    loaded = SentenceTransformer(str(tmp_path / "btok"), device="cpu")
    samples = [picture(), "red"]
    np.testing.assert_allclose(loaded.encode(samples), qwen.encode(samples), atol=1e-6)


def test_a_saved_model_trains_on_without_conversion(qwen, tmp_path):
    qwen.save_pretrained(str(tmp_path / "first"))
    model = SentenceTransformer(str(tmp_path / "first"), device="cpu")
    assert any(p.requires_grad for p in model[1].parameters()), "loading makes WordWeights trainable again"
    weights = model[1].emb_layer.weight.clone()
    loss = BTokLoss(model)
    SentenceTransformerTrainer(
        model=model, args=arguments(tmp_path, max_steps=3), train_dataset=dataset(), loss=loss
    ).train()
    assert torch.equal(model[1].emb_layer.weight, weights)
    assert np.abs(model.encode(["red"]) - qwen.encode(["red"])).max() > 1e-3


def test_parameters_that_are_unfrozen_after_the_loss_was_made_leave_the_pooling_alone(qwen):
    """As who freezes a tower by hand does: 20 tokens had a weight after ten steps instead of 4."""
    loss = BTokLoss(qwen)
    features = [qwen.preprocess(texts) for texts in TEXTS]
    for name, parameter in qwen.named_parameters():
        parameter.requires_grad = "visual" not in name
    with pytest.raises(ValueError, match="WordWeights.*'emb_layer'"):
        loss(features)
    for name, parameter in qwen.named_parameters():
        parameter.requires_grad = "visual" not in name and "emb_layer" not in name
    total(loss(features)).backward()


def test_several_datasets_with_their_own_losses(qwen, tmp_path):
    data = DatasetDict({"captions": dataset(), "questions": asked()})
    losses = {"captions": BTokLoss(qwen, target="positive"), "questions": BTokLoss(qwen, target="none")}
    trainer = SentenceTransformerTrainer(
        model=qwen, args=arguments(tmp_path, max_steps=4), train_dataset=data, loss=losses
    )
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_gradient_accumulation_equals_the_mean_of_batches(qwen, tmp_path):
    loss = BTokLoss(qwen)
    features = [[qwen.preprocess([f"{i}", "b"]), qwen.preprocess([f"p{i}", "q"])] for i in range(2)]
    expected = [run(loss, batch).grads for batch in features]
    loss.model.zero_grad()
    for batch in features:
        (total(loss(batch)) / 2).backward()
    for name, grad in gradients(qwen).items():
        torch.testing.assert_close(grad, (expected[0][name] + expected[1][name]) / 2, atol=1e-6, rtol=1e-4)


def test_bf16_autocast_trains(qwen, tmp_path):
    trainer = SentenceTransformerTrainer(
        model=qwen, args=arguments(tmp_path, max_steps=2, bf16=True), train_dataset=dataset(), loss=BTokLoss(qwen)
    )
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])


@pytest.mark.parametrize("loss_class", [BTokLoss, CachedBTokLoss])
def test_a_single_column_is_refused_with_what_is_needed(qwen, loss_class):
    with pytest.raises(ValueError, match="at least two columns of inputs, query and positive, got 1"):
        loss_class(qwen)([qwen.preprocess(["a", "b"])])
