"""The LM head is the one that transformers generates with; untied ones are frozen or trained by choice."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import nn
from transformers import AutoModel

from st_btok import BTokLoss, build_model
from st_btok.model_parts import checkpoint_head, embedding_matrix
from st_btok.training.lm_head import TrainedHead, output_embeddings, save_lm_head
from tests.backbones import build

DATA = Dataset.from_dict({"query": list("abcdef"), "positive": ["one", "two", "three", "four", "five", "six"]})


# What the configs say (of the whole, of its text part), and whether the checkpoint holds a head of its own.
CASES = {
    "tied": (True, True, False),
    "untied": (False, False, True),
    "says tied": (True, True, True),
    "text part alone says tied": (False, True, True),
    "text part alone says untied": (True, False, True),
    "text part alone says untied, tied": (True, False, False),
}


def checkpoint(family, case, folder):
    """A full checkpoint on disk, and the class that transformers reads it with."""
    whole, text, own = CASES[case]
    backbone, processor = build(family, tied=not own)
    backbone.config.get_text_config().tie_word_embeddings = text
    backbone.config.tie_word_embeddings = whole
    backbone.save_pretrained(folder)
    processor.save_pretrained(folder)
    return type(backbone)


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_the_one_that_transformers_generates_with(family, case, tmp_path):
    """Wherever it stands in the checkpoint and whatever the flags say; only its two matrices are read."""
    full = checkpoint(family, case, tmp_path).from_pretrained(tmp_path)
    expected, tied = full.get_output_embeddings().weight, full.get_output_embeddings().weight is embedding_matrix(full)
    backbone = AutoModel.from_pretrained(tmp_path)
    found = output_embeddings(backbone)
    assert torch.equal(found, expected)
    assert (found is embedding_matrix(backbone)) is tied
    assert torch.equal(output_embeddings(backbone, str(tmp_path)), expected)
    # What is saved after training holds no head: it is not mistaken for one.
    backbone.save_pretrained(tmp_path / "base")
    saved = checkpoint_head(str(tmp_path / "base"), backbone.config)
    assert (saved[0] is None) is not saved[1]


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", "says tied"), ("gemma3", "untied"), ("qwen2_vl", "text part alone says tied"), ("qwen3", "tied")],
)
def test_a_built_model_says_whether_its_head_is_tied_ever_after(family, case, tmp_path):
    """A saved model holds no head; trained on, it would take the embeddings for one where the config is wrong."""
    head = (
        checkpoint(family, case, tmp_path / "full").from_pretrained(tmp_path / "full").get_output_embeddings().weight
    )
    model = build_model(tmp_path / "full", device="cpu")
    tied = case == "tied"
    assert model[0].model.config.tie_word_embeddings is tied
    expected = BTokLoss(model).lm_head
    assert expected is None if tied else torch.equal(expected, head)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"))
    if tied:
        assert BTokLoss(loaded).lm_head is None
        return
    with pytest.raises(ValueError, match="LM head is not tied to its embeddings, and must be found: .* holds none"):
        BTokLoss(loaded)
    assert torch.equal(BTokLoss(loaded, lm_head=str(tmp_path / "full")).lm_head, head)


def test_a_loaded_model_says_it_too():
    """Its head differs from its embeddings, so a config that says tied is corrected; the head is then named."""
    backbone, tokenizer = build("llama")
    backbone.lm_head.weight = nn.Parameter(torch.randn_like(backbone.lm_head.weight))
    model = build_model(backbone, processor=tokenizer, device="cpu")
    assert backbone.config.tie_word_embeddings and not model[0].model.config.tie_word_embeddings
    with pytest.raises(ValueError, match="LM head is not tied"):
        BTokLoss(model)
    assert torch.equal(BTokLoss(model, lm_head=backbone.lm_head).lm_head, backbone.lm_head.weight)


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


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_thinker_stands_in_the_whole_omni_checkpoint(tied, tmp_path):
    """Under `thinker.lm_head.weight`, beside a talker that is not read."""
    thinker, _ = build("qwen2_5_omni", tied=tied)
    thinker.save_pretrained(tmp_path / "thinker")
    weights = load_file(tmp_path / "thinker/model.safetensors")
    (tmp_path / "whole").mkdir()
    save_file({f"thinker.{name}": value for name, value in weights.items()}, tmp_path / "whole/model.safetensors")
    config = {"model_type": "qwen2_5_omni", "thinker_config": thinker.config.to_dict()}
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    head, found = checkpoint_head(str(tmp_path / "whole"), thinker.config)
    assert torch.equal(head, thinker.lm_head.weight) and found is tied
