"""The loss under gradient checkpointing (invariant 9), in bf16, under autocast, compiled; frozen and trained parts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_btok import BTokLoss
from st_btok.adapters import btok_lora_config, merge_adapters
from tests.backbones import picture, takes
from tests.losses import assert_same, run


def columns(model, family):
    """A query and a positive column with media, both, and neither."""
    if not takes(family, "image"):
        queries, positives = ["a", "bb", "what?"], ["one", "two", "three kittens"]
    else:
        queries = [picture(), {"image": picture(28, 28), "text": "what?"}, "a text", picture(28, 56)]
        positives = ["red", "blue", picture(56, 56), picture(28, 28)]
    return [model.preprocess(queries), model.preprocess(positives)]


def test_gradient_checkpointing_changes_nothing(model, family):
    features = columns(model, family)
    model.train()
    expected = run(BTokLoss(model), features)
    for use_reentrant in (False, True) if family == "qwen2_vl" else (False,):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert model[0].model.is_activation_checkpointing
        assert_same(run(BTokLoss(model), features), expected)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_gradient_checkpointing_with_adapters(qwen, use_dora):
    """With a frozen base, inputs of a checkpointed layer need gradients, or nothing in it would train."""
    torch.manual_seed(1)
    qwen.add_adapter(btok_lora_config(qwen, r=4, dropout=0.2, use_dora=use_dora, init_lora_weights=False))
    features = columns(qwen, "qwen2_vl")
    qwen.train()
    expected = run(BTokLoss(qwen), features)
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(BTokLoss(qwen), features), expected)


@pytest.mark.parametrize("mode", ["loaded", "autocast"])
def test_half_precision_stays_close(model, family, mode):
    """Weights in bf16, or fp32 weights under autocast: the condensation loss is still computed in float32."""
    features = columns(model, family)
    model.train()
    expected = run(BTokLoss(model), features)
    if mode == "loaded":
        model.to(torch.bfloat16)
        found = run(BTokLoss(model), features)
    else:
        found = run(BTokLoss(model), features, context=torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(found.total, expected.total, atol=0.1, rtol=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in found.grads.values())


def test_adapters_in_bf16_merge_and_reload(qwen, tmp_path):
    """Adapters on a bf16 model are bf16 and reload exactly; merging rounds the sums to bf16, so it is only close."""
    qwen.to(torch.bfloat16).save_pretrained(str(tmp_path / "base"))
    model = SentenceTransformer(str(tmp_path / "base"), model_kwargs={"dtype": "bfloat16"})
    torch.manual_seed(1)
    model.add_adapter(btok_lora_config(model, r=4, dropout=0.0, use_dora=True, init_lora_weights=False))
    assert {p.dtype for p in model[0].parameters()} == {torch.bfloat16}
    run(BTokLoss(model.train()), columns(model, "qwen2_vl"))
    model.eval()
    expected = model.encode(["a", "What is the city?"])
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), model_kwargs={"dtype": "bfloat16"})
    np.testing.assert_array_equal(loaded.encode(["a", "What is the city?"]), expected)
    merged = merge_adapters(model).encode(["a", "What is the city?"])
    assert (merged * expected).sum(1).min() > 0.99


def test_compiled_as_the_trainer_compiles(btok_model):
    """`torch_compile=True` compiles the whole model; a batch of equal shape must not get the mask of the last one."""
    model = btok_model("llama").train()
    batches = [
        [model.preprocess(["ab", "what?"]), model.preprocess(positives)]
        for positives in (["one", "fourteen"], ["fourteen", "one"])
    ]
    expected = [run(BTokLoss(model), batch) for batch in batches]
    assert abs(expected[0].total - expected[1].total) > 1e-3
    loss = BTokLoss(model)
    compiled = torch.compile(model, backend="eager")  # what dynamo captures is what can go wrong here
    loss.model = loss.ranking.model = compiled
    for batch, wanted in zip(batches, expected, strict=True):
        found = run(loss, batch)
        found.grads = {name.removeprefix("_orig_mod."): grad for name, grad in found.grads.items()}
        assert_same(found, wanted)


def test_what_is_frozen_stays(qwen):
    """A frozen vision tower and frozen embeddings get no gradient, and the loss still reaches the rest."""
    frozen = copy.deepcopy(qwen.train())
    features = columns(qwen, "qwen2_vl")
    expected = run(BTokLoss(qwen), features)
    frozen[0].model.visual.requires_grad_(False)
    frozen[0].model.get_input_embeddings().requires_grad_(False)
    found = run(BTokLoss(frozen), features)
    torch.testing.assert_close(found.total, expected.total)
    assert found.grads and not any("visual" in name or "embed_tokens" in name for name in found.grads)
    for name, gradient in found.grads.items():
        torch.testing.assert_close(gradient, expected.grads[name])
