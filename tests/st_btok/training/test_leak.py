"""The leak probe (invariant 4) and the LM head."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from st_btok import BTokLoss, build_model
from st_btok.model_parts import find_btoks
from st_btok.training import leak as condensation_module
from st_btok.training.leak import find_leak
from st_btok.training.lm_head import output_embeddings
from st_btok.training.mask import TARGET, condensation_attention
from st_btok.training.targets import join_targets
from tests.backbones import build, inputs, total


def joint(model, family):
    """Joint rows of every modality that a family takes."""
    samples = inputs(family)[:-1]
    texts = [
        torch.tensor(model.tokenizer(f"target number {i}", add_special_tokens=False)["input_ids"])
        for i in range(len(samples))
    ]
    return join_targets(model.preprocess(samples), texts, find_btoks(model)[1])


def masks(model):
    """Whether the attention route is for this backbone."""
    return BTokLoss(model).route == "attention"


def test_the_mask_leaves_no_path_but_the_btoks(model, family, monkeypatch):
    """Invariant 4, exactly 0, for text and pixels; and the probe sees a leak where the mask is off."""
    if not masks(model):
        with pytest.raises(ValueError, match="Use route="):
            BTokLoss(model, route="attention")
        return
    batch = joint(model, family)
    transformer, _ = find_btoks(model)
    assert find_leak(transformer, batch) == 0.0
    monkeypatch.setattr(condensation_module, "condensation_attention", lambda *args: nullcontext())
    assert find_leak(transformer, batch) > 0.0, "without the mask the probe must see the input"
    ids = transformer.model.get_input_embeddings()
    assert ids.weight.grad is None, "the probe leaves no gradients"


def test_gradients_reach_the_target_through_the_btoks_only(model, family):
    """Finite differences: moving a BTok row moves the target's likelihood, also with the input cut off."""
    if not masks(model):
        return
    batch = joint(model, family)
    transformer, ids = find_btoks(model)
    rows = transformer.model.get_input_embeddings().weight

    def target_states():
        with torch.no_grad(), condensation_attention(transformer.model, batch.segments):
            return transformer(dict(batch.features))["token_embeddings"][batch.segments == TARGET]

    before = target_states()
    with torch.no_grad():
        rows[ids] += 0.1
    assert (target_states() - before).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["module", "tensor", "path", "name_in_config"])
def test_untied_heads(form, tmp_path):
    torch.manual_seed(0)
    full, processor = build("qwen2_vl", tied=False)
    full.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = build_model(tmp_path, device="cpu")
    backbone = model[0].model
    given = {"module": full.lm_head, "tensor": full.lm_head.weight, "path": str(tmp_path), "name_in_config": None}[
        form
    ]
    torch.testing.assert_close(output_embeddings(backbone, given), full.lm_head.weight)
    assert not torch.equal(output_embeddings(backbone, given), backbone.get_input_embeddings().weight[:288])
    loss = BTokLoss(model, lm_head=given)
    features = [model.preprocess(["a", "b"]), model.preprocess(["c", "d"])]
    total(loss(features)).backward()
    assert loss.lm_head is not None and loss.lm_head.grad is None, "frozen"
    assert "lm_head" not in "".join(model.state_dict()), "not part of the embedder"


def test_sharded_heads_are_read_without_the_rest(tmp_path):
    full, _ = build("llama", tied=False)
    full.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(output_embeddings(full.model, str(tmp_path)), full.lm_head.weight)


def test_a_missing_head_is_an_error_with_the_way_out(tmp_path):
    full, processor = build("llama", tied=False)
    model = build_model(full, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="not tied.*BTokLoss"):
        BTokLoss(model, lm_head=str(tmp_path))
    model[0].model.config.name_or_path = ""
    with pytest.raises(ValueError, match="lm_head=full_model.get_output_embeddings"):
        BTokLoss(model)
    BTokLoss(model, target="none")


def test_tied_head_is_the_live_matrix(qwen):
    backbone = qwen[0].model
    assert output_embeddings(backbone) is backbone.get_input_embeddings().weight
    assert BTokLoss(qwen).lm_head is None
