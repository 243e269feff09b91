"""The loss under gradient checkpointing (invariant 9), in bf16, under autocast, compiled; frozen and trained parts."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_btok import BTokLoss
from st_btok.adapters import btok_lora_config, merge_adapters
from tests.backbones import picture, takes, total


def columns(model, family):
    first = picture(28, 28) if takes(family, "image") else "a"
    return [model.preprocess([first, "a text"]), model.preprocess(["red", "two kittens"])]


def run(model, features, context=None, loss=None):
    """Value and gradients of one call in training mode; dropout draws the same every time."""
    loss = loss or BTokLoss(model)
    model.zero_grad()
    model.train()
    torch.manual_seed(3)
    with context or nullcontext():
        value = total(loss([dict(column) for column in features]))
    value.backward()
    return value.detach().float(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, atol=1e-5):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys() and len(expected[1]) > 10
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=atol, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(model, family):
    features = columns(model, family)
    expected = run(model, features)
    for use_reentrant in (False, True) if family == "qwen2_vl" else (False,):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert model[0].model.is_activation_checkpointing
        assert_same(run(model, features), expected)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_gradient_checkpointing_with_adapters(qwen, use_dora, monkeypatch):
    """With a frozen base, inputs of a checkpointed layer need gradients, or nothing in it would train."""
    # Dropout draws in the order of the calls, and under checkpointing targets are not read in calls of their own.
    monkeypatch.setattr("st_btok.training.apart.KEPT_BY_A_LAYER", 0)
    torch.manual_seed(1)
    qwen.add_adapter(btok_lora_config(qwen, r=4, dropout=0.2, use_dora=use_dora, init_lora_weights=False))
    features = columns(qwen, "qwen2_vl")
    expected = run(qwen, features)
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(qwen, features), expected)


@pytest.mark.parametrize("mode", ["loaded", "autocast"])
def test_half_precision_stays_close(model, family, mode):
    """Weights in bf16, or fp32 weights under autocast: the term is still computed in float32."""
    features = columns(model, family)
    expected, _ = run(model, features)
    if mode == "loaded":
        model.to(torch.bfloat16)
        value, gradients = run(model, features)
    else:
        value, gradients = run(model, features, torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(value, expected, atol=0.1, rtol=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_adapters_in_bf16_merge_and_reload(qwen, tmp_path):
    """Adapters on a bf16 model are bf16 and reload exactly; merging rounds the sums to bf16, so it is only close."""
    qwen.to(torch.bfloat16).save_pretrained(str(tmp_path / "base"))
    model = SentenceTransformer(str(tmp_path / "base"), model_kwargs={"dtype": "bfloat16"})
    torch.manual_seed(1)
    model.add_adapter(btok_lora_config(model, r=4, dropout=0.0, use_dora=True, init_lora_weights=False))
    assert {p.dtype for p in model[0].parameters()} == {torch.bfloat16}
    run(model, columns(model, "qwen2_vl"))
    model.eval()
    expected = model.encode(["a", "What is the city?"])
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), model_kwargs={"dtype": "bfloat16"})
    np.testing.assert_array_equal(loaded.encode(["a", "What is the city?"]), expected)
    merged = merge_adapters(model).encode(["a", "What is the city?"])
    assert (merged * expected).sum(1).min() > 0.99


def test_compiled_as_the_trainer_compiles(btok_model):
    """`torch_compile=True` compiles the whole model; a batch of equal shape must not get the mask of the last one."""
    model = btok_model("llama")
    batches = [
        [model.preprocess(["ab", "what?"]), model.preprocess(positives)]
        for positives in (["one", "fourteen"], ["fourteen", "one"])
    ]
    expected = [run(model, batch) for batch in batches]
    assert abs(expected[0][0] - expected[1][0]) > 1e-3
    loss = BTokLoss(model)
    compiled = torch.compile(model, backend="eager")  # what dynamo captures is what can go wrong here
    loss.model = loss.ranking.model = compiled
    for batch, wanted in zip(batches, expected, strict=True):
        assert_same(run(model, batch, loss=loss), wanted)


def test_what_is_frozen_stays(qwen):
    """A frozen vision tower and frozen embeddings get no gradient, and the loss still reaches the rest."""
    frozen = copy.deepcopy(qwen)
    features = columns(qwen, "qwen2_vl")
    expected = run(qwen, features)
    frozen[0].model.visual.requires_grad_(False)
    frozen[0].model.get_input_embeddings().requires_grad_(False)
    value, gradients = run(frozen, features)
    torch.testing.assert_close(value, expected[0])
    assert not any("visual" in name or "embed_tokens" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name])
