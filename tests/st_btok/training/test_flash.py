"""Flash attention takes no mask, so targets are read from keys and values: with the same value and gradients."""

from __future__ import annotations

import pytest
import torch

from st_btok import BTokLoss, CachedBTokLoss, build_model
from tests import flash
from tests.backbones import BUILDERS, build, picture
from tests.losses import assert_same, columns, plain_of, run

# Without those whose layers are not all attention.
FAMILIES = [name for name in BUILDERS if name not in ("mamba", "qwen3_5")]


@pytest.fixture(autouse=True)
def called(monkeypatch):
    return flash.on_the_cpu(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_loss_as_under_a_mask(btok_model, family, called):
    model = btok_model(family)
    # Gemma 3's pictures are next.
    features = columns(model, "gemma" if family == "gemma3" else family)
    masked, unmasked = ("prefix", "prefix") if family == "gemma2" else ("attention", "kv")  # Gemma 2 has no SDPA
    expected = run(BTokLoss(model, route=masked), features)
    model[0].model.set_attn_implementation("flash_attention_2")
    for make in (BTokLoss, lambda own: CachedBTokLoss(own, mini_batch_size=2)):
        called.clear()
        loss = make(model)
        assert plain_of(loss).route == unmasked
        assert_same(run(loss, features), expected, atol=2e-5)
        assert "flash_attn_varlen_func" in called


@pytest.mark.parametrize("attention", ["flash_attention_2", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "gemma"])
def test_layers_are_recomputed_under_the_mask_they_were_computed_under(btok_model, family, attention):
    model = btok_model(family)
    features = columns(model, family)
    expected = run(BTokLoss(model), features)
    model[0].model.set_attn_implementation(attention)
    model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = BTokLoss(model.train())
    assert loss.route == "attention", "checkpointing leaves no keys and values to read"
    assert_same(run(loss, features), expected, atol=2e-5)
    assert model[0].model.config.get_text_config(decoder=True)._attn_implementation == attention


def test_pictures_of_gemma3_are_others_under_flash_attention(btok_model):
    """Their tokens see each other in both directions, which takes a mask: transformers leaves that out in silence."""
    model = btok_model("gemma3")
    masked = model.encode([picture(), "text"], convert_to_tensor=True)
    model[0].model.set_attn_implementation("flash_attention_2")
    found = model.encode([picture(), "text"], convert_to_tensor=True)
    change = (found - masked).abs().amax(1)
    assert change[0] > 1e-3 and change[1] < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_a_model_is_built_with_it(btok_model, tmp_path, family):
    backbone, processor = build(family)
    backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = build_model(tmp_path, model_kwargs={"attn_implementation": "flash_attention_2"}, device="cpu")
    texts = ["one", "two three four"]
    torch.testing.assert_close(
        model.encode(texts, convert_to_tensor=True), btok_model(family).encode(texts, convert_to_tensor=True)
    )
    assert BTokLoss(model).route == "kv"
