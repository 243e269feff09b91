"""The condensation mask against a table written by hand, and through real attention layers."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import causal_mask_function

from st_btok import condensation_attention, condensation_mask, register_condensation_attention
from st_btok.training.mask import BTOK, CONDENSATION_ATTENTION, INPUT, TARGET
from tests.backbones import build

# Row = query, column = key: two input tokens, two BToks, three target tokens.
TABLE = """
1 1 1 1 1 1 1
1 1 1 1 1 1 1
1 1 1 1 1 1 1
1 1 1 1 1 1 1
0 0 1 1 1 1 1
0 0 1 1 1 1 1
0 0 1 1 1 1 1
"""


def test_predicate_is_the_table():
    segments = torch.tensor([[INPUT, INPUT, BTOK, BTOK, TARGET, TARGET, TARGET], [INPUT] * 7])
    q, k = torch.arange(7)[:, None], torch.arange(7)[None]
    allowed = condensation_mask(segments)
    expected = torch.tensor([[int(v) for v in line.split()] for line in TABLE.strip().splitlines()]).bool()
    assert torch.equal(allowed(torch.tensor(0), None, q, k), expected)
    assert allowed(torch.tensor(1), None, q, k).all()
    assert causal_mask_function(None, None, torch.tensor(1), torch.tensor(2)).item() is False  # the one ANDed with it


def test_registered_name_without_segments_is_plain_sdpa():
    register_condensation_attention()
    register_condensation_attention()
    model, _ = build("llama")
    ids = torch.arange(3, 11)[None]
    expected = model(ids).logits
    model.config._attn_implementation = CONDENSATION_ATTENTION
    assert torch.equal(model(ids).logits, expected)


def test_context_switches_the_text_config_only_and_back():
    model, _ = build("qwen2_vl")
    with condensation_attention(model, torch.zeros(1, 4, dtype=torch.long)):
        assert model.config.text_config._attn_implementation == CONDENSATION_ATTENTION
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="stop"), condensation_attention(model, torch.zeros(1, 4)):
        raise RuntimeError("stop")
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_masked_positions_do_not_reach_the_target(side):
    """Changing an input token changes the target's logits through the BToks only; with them cut off, not at all."""
    model, _ = build("llama")
    ids = torch.randint(3, 250, (2, 9))
    mask = torch.ones_like(ids)
    segments = torch.tensor([[INPUT] * 3 + [BTOK] * 2 + [TARGET] * 4] * 2)
    if side == "left":
        mask[1, :2] = 0
    elif side == "right":
        mask[1, -2:] = 0
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % 250
    cut = torch.where(segments == BTOK, INPUT, segments)

    def target_logits(tokens, roles):
        with condensation_attention(model, roles), torch.no_grad():
            return model(tokens, attention_mask=mask).logits[:, 5:]

    def plain(tokens):
        return model(tokens, attention_mask=mask).logits[:, 5:].detach()

    assert (target_logits(ids, segments) - plain(ids)).abs().max() > 1e-3, "the mask does something"
    assert (target_logits(ids, segments) - target_logits(changed, segments)).abs().max() > 1e-3
    assert torch.equal(target_logits(ids, cut), target_logits(changed, cut))


def test_a_backbone_without_sdpa_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    model._supports_sdpa = False
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not"), condensation_attention(model, torch.zeros(1, 2)):
        pass
