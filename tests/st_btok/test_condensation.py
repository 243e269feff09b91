"""The condensation term against full logits computed by hand, invariants 3 and 4, and the LM head."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from st_btok import BTokLoss, build_model, condensation_nll
from st_btok import condensation as condensation_module
from st_btok.attention import INPUT, TARGET, condensation_attention
from st_btok.condensation import NLL_KEY, condensed_forward, find_leak, output_embeddings
from st_btok.model import find_btoks
from tests.backbones import build, inputs, tokenizer


def joint(model, family, side="positive"):
    """A column with every modality, its joint rows, and their targets."""
    samples = inputs(family)[:-1]
    features = model.preprocess(samples)
    positives = model.preprocess([f"target number {i}" for i in range(len(samples))])
    batch = next(iter(BTokLoss(model, target=side).joint_batches([features, positives])))
    return features, batch


def test_nll_is_cross_entropy_in_chunks(monkeypatch):
    states = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (7,))
    expected = F.cross_entropy((states @ head.T).float(), labels, reduction="none")
    wanted = torch.autograd.grad(expected.square().sum(), [states, head])
    for logits in (2**25, 150, 1):
        monkeypatch.setattr(condensation_module, "_MAX_LOGITS", logits)
        found = condensation_nll(states, labels, head)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found.square().sum(), [states, head]), wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert condensation_nll(states[:0], labels[:0], head).shape == (0,)


def test_logits_never_exist_for_the_whole_batch(monkeypatch):
    sizes = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: sizes.append(len(x) * len(w)) or linear(x, w))
    monkeypatch.setattr(condensation_module, "_MAX_LOGITS", 200)
    condensation_nll(torch.randn(30, 8), torch.zeros(30, dtype=torch.long), torch.randn(50, 8))
    assert len(sizes) == 8 and max(sizes) <= 200


@pytest.mark.parametrize("side", ["left", "right"])
def test_term_is_the_masked_likelihood_of_the_target(model, family, side):
    """Independent truth: logits of the bare backbone, one row at a time, under an explicit 4-D mask."""
    model.tokenizer.padding_side = side
    features, batch = joint(model, family)
    transformer, ids = find_btoks(model)
    head = transformer.model.get_input_embeddings().weight
    with torch.no_grad(), condensed_forward(transformer, batch, head):
        nll = model(dict(features))[NLL_KEY]
    assert len(nll) == len(features["input_ids"])
    for row in range(3):  # the text rows; rows with media have no position ids under a 4-D mask
        tokens = batch.features["input_ids"][row][batch.features["attention_mask"][row].bool()]
        roles = batch.segments[row][: len(tokens)]
        allowed = torch.ones(len(tokens), len(tokens)).tril().bool()
        allowed &= ~((roles == TARGET)[:, None] & (roles == INPUT)[None])
        positions = torch.arange(len(tokens))[None]
        with torch.no_grad():
            states = transformer.model(
                input_ids=tokens[None],
                attention_mask=allowed[None, None],
                position_ids=positions if family == "llama" else positions.expand(3, 1, -1),
            ).last_hidden_state[0]
        first = int((roles == TARGET).nonzero()[0])
        logits = states[first - 1 : -1] @ head.T
        expected = F.cross_entropy(logits, tokens[first:], reduction="sum")
        torch.testing.assert_close(nll[row], expected, atol=1e-4, rtol=1e-5)


def test_embedding_with_a_target_is_the_embedding_without(model, family):
    """Invariant 3."""
    features, batch = joint(model, family)
    transformer, _ = find_btoks(model)
    with torch.no_grad():
        expected = model(dict(features))["sentence_embedding"]
        with condensed_forward(transformer, batch, transformer.model.get_input_embeddings().weight):
            output = model(dict(features))
        again = model(dict(features))
    torch.testing.assert_close(output["sentence_embedding"], expected, atol=1e-5, rtol=0)
    assert output["token_embeddings"].shape == again["token_embeddings"].shape
    assert NLL_KEY not in again, "the hooks are gone"


def test_the_mask_leaves_no_path_but_the_btoks(model, family, monkeypatch):
    """Invariant 4, exactly 0, for text and pixels; and the probe sees a leak where the mask is off."""
    _, batch = joint(model, family)
    transformer, _ = find_btoks(model)
    assert find_leak(transformer, batch) == 0.0
    monkeypatch.setattr(condensation_module, "condensation_attention", lambda *args: nullcontext())
    assert find_leak(transformer, batch) > 0.0, "without the mask the probe must see the input"
    ids = transformer.model.get_input_embeddings()
    assert ids.weight.grad is None, "the probe leaves no gradients"


def test_gradients_reach_the_target_through_the_btoks_only(model, family):
    """Finite differences: moving a BTok row moves the target's likelihood, also with the input cut off."""
    _, batch = joint(model, family)
    transformer, ids = find_btoks(model)
    rows = transformer.model.get_input_embeddings().weight

    def target_states():
        with torch.no_grad(), condensation_attention(transformer.model, batch.segments):
            return transformer(dict(batch.features))["token_embeddings"][batch.segments == TARGET]

    before = target_states()
    with torch.no_grad():
        rows[ids] += 0.1
    assert (target_states() - before).abs().max() > 1e-3


def test_a_recurrent_backbone_leaks():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=288, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=258)
    own = tokenizer("{%- for m in messages -%}{{ m.content }}<|im_end|>{%- endfor -%}")
    model = build_model(MambaForCausalLM(config).eval(), processor=own, device="cpu")
    features = [model.preprocess(texts) for texts in (["a kitten", "b"], ["c", "d"])]
    with pytest.raises(ValueError, match="MambaModel|attention route"):
        BTokLoss(model)(features)
    assert torch.isfinite(BTokLoss(model, condensation_weight=0)(features).sum())


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
    loss(features).sum().backward()
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
    with pytest.raises(ValueError, match="lm_head=full_model.lm_head"):
        BTokLoss(model)
    BTokLoss(model, target="none")


def test_tied_head_is_the_live_matrix(qwen):
    backbone = qwen[0].model
    assert output_embeddings(backbone) is backbone.get_input_embeddings().weight
    assert BTokLoss(qwen).lm_head is None
