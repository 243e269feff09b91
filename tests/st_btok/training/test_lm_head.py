"""Untied LM heads: frozen or trained by choice, outside of the embedder, and complete on resuming."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_btok import BTokLoss, build_model
from st_btok.training.lm_head import TrainedHead, save_lm_head
from tests.backbones import build

DATA = Dataset.from_dict({"query": list("abcdef"), "positive": ["one", "two", "three", "four", "five", "six"]})


def untied(train):
    backbone, tokenizer = build("llama", tied=False)
    model = build_model(backbone, processor=tokenizer, device="cpu")
    return BTokLoss(model, lm_head=backbone.lm_head.weight.detach().clone(), train_lm_head=train)


def fit(loss, folder, resume=None):
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [TrainedHead(loss.lm_head)] if loss.lm_head.requires_grad else []
    trainer = SentenceTransformerTrainer(
        model=loss.model, args=args, train_dataset=DATA, loss=loss, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)


def test_a_frozen_head_stays_and_a_trained_one_moves(tmp_path):
    for train in (False, True):
        loss = untied(train)
        before = loss.lm_head.detach().clone()
        fit(loss, tmp_path / str(train))
        assert torch.equal(loss.lm_head, before) is not train
        assert all(
            "lm_head" not in name for name in load_file(tmp_path / str(train) / "checkpoint-4/model.safetensors")
        )
        assert (tmp_path / str(train) / "checkpoint-4/lm_head").exists() is train
    checkpoint = tmp_path / "True/checkpoint-4"
    loaded = SentenceTransformer(str(checkpoint))
    again = BTokLoss(loaded, lm_head=str(checkpoint / "lm_head"))
    assert torch.equal(again.lm_head, loss.lm_head) and not again.lm_head.requires_grad


def test_resuming_restores_the_head_bit_by_bit(tmp_path):
    whole, resumed = untied(True), untied(True)
    fit(whole, tmp_path)
    fit(resumed, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.lm_head, whole.lm_head)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="lm_head folder"):
        fit(untied(True), tmp_path / "elsewhere", resume=str(tmp_path / "checkpoint-2"))


def test_a_head_is_written_on_request_only(tmp_path):
    loss = untied(True)
    save_lm_head(loss.lm_head, tmp_path / "head")
    assert torch.equal(BTokLoss(loss.model, lm_head=str(tmp_path / "head")).lm_head, loss.lm_head)


def test_there_must_be_a_head_that_trains():
    with pytest.raises(ValueError, match="a frozen head"):
        TrainedHead(untied(False).lm_head)
    with pytest.raises(ValueError, match=r"no head \(tied\)"):
        TrainedHead(None)
