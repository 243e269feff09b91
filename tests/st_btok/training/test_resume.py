"""What the Trainer saves while it trains: it loads plainly, and training goes on from it bit by bit."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_btok import BTokCallback, BTokLoss, build_model
from st_btok.adapters import btok_lora_config, merge_adapters
from st_btok.model_parts import embedding_matrix, find_btoks, without_adapter
from tests.backbones import build

TEXTS = ["one", "two kittens", "three", "four", "five six", "seven"]
DATA = Dataset.from_dict({"query": list("abcdef"), "positive": TEXTS})
FORMS = ["full", "lora", "dora"]


@functools.cache
def _backbone():
    model, tokenizer = build("llama")
    model.config.attention_dropout = 0.2  # of the full fine-tune; adapters have their own besides
    return build_model(model, processor=tokenizer, device="cpu")


def made(form, folder):
    """The same untrained model at every call; its adapter refers to `folder`."""
    model = copy.deepcopy(_backbone())
    if form != "full":
        torch.manual_seed(5)
        model.add_adapter(btok_lora_config(model, r=4, dropout=0.2, use_dora=form == "dora", base=folder))
    return model


def train(model, folder, resume=None, **options):
    torch.manual_seed(10 if resume else 9)  # what a new process starts from must not matter
    options = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2, **options}
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        **options,
    )
    # The weight changes at step 3, after the checkpoint: schedules count the Trainer's steps.
    loss = BTokLoss(model, condensation_weight=lambda step: 2.0 if step < 3 else 0.5)
    evaluation = {"eval_dataset": DATA} if "eval_steps" in options else {}
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=DATA, loss=loss, callbacks=[BTokCallback()], **evaluation
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    keys = ("step", "loss", "grad_norm", "ranking", "condensation", "condensation_weight")
    return [{key: row[key] for key in keys} for row in trainer.state.log_history if "loss" in row]


def drops_out(model):
    features = model.train().preprocess(TEXTS)
    return not torch.equal(*(model(dict(features))["sentence_embedding"] for _ in range(2)))


@pytest.mark.parametrize("form", ["full", "lora"])
def test_attention_pooling_trains_and_resumes(form, tmp_path):
    """Its weights learn beside adapters, too, and are in every checkpoint."""
    backbone, tokenizer = build("llama")

    def attentive():
        model = build_model(backbone, processor=tokenizer, readout="attention", device="cpu")
        if form == "lora":
            torch.manual_seed(5)
            model.add_adapter(btok_lora_config(model, r=4, base=tmp_path / "base"))
        return model

    model = attentive()
    before = copy.deepcopy(model[1].state_dict())
    through = train(model, tmp_path / "through")
    assert all(not torch.equal(before[name], value) for name, value in model[1].state_dict().items())
    resumed = attentive()
    train(resumed, tmp_path / "through", resume=str(tmp_path / "through" / "checkpoint-2"))
    np.testing.assert_array_equal(resumed.eval().encode(TEXTS), through.model.eval().encode(TEXTS))
    loaded = SentenceTransformer(str(tmp_path / "through" / "checkpoint-4"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(loaded.encode(TEXTS), resumed.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_resuming_continues_bit_by_bit(form, tmp_path):
    """Loss, gradient norm and weights, with dropout, in the middle of an epoch and of a schedule."""
    whole, start = made(form, tmp_path / "base"), copy.deepcopy(_backbone()).state_dict()
    assert drops_out(whole)
    unbroken = losses(train(whole, tmp_path / "run"))
    resumed = made(form, tmp_path / "base")
    assert losses(train(resumed, tmp_path / "second", resume=str(tmp_path / "run/checkpoint-2"))) == unbroken
    assert [row["condensation_weight"] for row in unbroken] == [2.0, 2.0, 2.0, 0.5]
    found, expected = resumed.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = [name for name in expected if name not in start or not torch.equal(expected[name], start[name])]
    assert len(changed) > 10


@pytest.mark.parametrize("end", ["resumed", "best"])
def test_an_adapter_on_the_bare_backbone_loses_no_base_rows(end, tmp_path):
    """Its checkpoints are put on a base whose rows of the bottleneck tokens hold anything; a tied head reads them."""
    backbone, tokenizer = build("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")

    def adapted():
        model = build_model(tmp_path / "backbone", device="cpu")
        torch.manual_seed(5)
        model.add_adapter(btok_lora_config(model, r=4, dropout=0.2))
        return model

    whole, options = adapted(), {}
    if end == "best":
        options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    base = embedding_matrix(whole[0].model).clone()
    unbroken = train(whole, tmp_path / "run", **options)
    assert torch.equal(embedding_matrix(whole[0].model), base)
    if end == "resumed":
        resumed = train(adapted(), tmp_path / "second", resume=str(tmp_path / "run/checkpoint-2"))
        assert losses(resumed) == losses(unbroken)
        found, expected = resumed.model.state_dict(), whole.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    loaded = SentenceTransformer(str(tmp_path / "run/checkpoint-4"), device="cpu")
    _, ids = find_btoks(loaded)
    assert not torch.equal(embedding_matrix(loaded[0].model)[ids], base[ids]), "else there is nothing to lose"


@pytest.mark.parametrize("with_base", [True, False])
def test_the_best_of_a_second_stage_stands_on_the_first(with_base, tmp_path, caplog):
    """What the first adapter left is no weight of the backbone that `name_or_path` names."""
    backbone, tokenizer = build("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    model = build_model(tmp_path / "backbone", device="cpu")
    model.add_adapter(btok_lora_config(model, r=4, dropout=0.0))
    train(model, tmp_path / "first", max_steps=2)
    merge_adapters(model)
    first = {name: value.clone() for name, value in model[0].model.named_parameters()}
    assert not torch.equal(first["layers.0.mlp.up_proj.weight"], backbone.model.layers[0].mlp.up_proj.weight)
    caplog.clear()
    model.add_adapter(btok_lora_config(model, r=4, dropout=0.0, base=tmp_path / "base" if with_base else None))
    assert ("can't be loaded or resumed" in caplog.text) is not with_base
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = train(model, tmp_path / "second", gradient_accumulation_steps=1, **options)
    for name, value in first.items():
        assert torch.equal(without_adapter(model[0].model, name), value), name
    if with_base:
        best = SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu")
        np.testing.assert_allclose(best.encode(TEXTS), model.eval().encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_load_plainly(form, tmp_path):
    """Invariant 8 for what is written on the way, and the best model is what is left at the end."""
    model = made(form, tmp_path / "base")
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = train(model, tmp_path / "run", gradient_accumulation_steps=1, **options)
    best = SentenceTransformer(trainer.state.best_model_checkpoint)
    np.testing.assert_allclose(best.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    trainer.save_model(str(tmp_path / "last"))
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "last")).encode(TEXTS), model.encode(TEXTS), atol=1e-6
    )
    expected = model.encode(TEXTS)
    merge_adapters(model).save_pretrained(str(tmp_path / "merged"))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "merged")).encode(TEXTS), expected, atol=1e-5)
    assert np.abs(expected - _backbone().encode(TEXTS)).max() > 1e-3
