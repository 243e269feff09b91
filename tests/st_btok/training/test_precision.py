"""Half-precision training: what it does to weights, when the loss says so, and that the remedy it names is one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from st_btok import BTokLoss, CachedBTokLoss, btok_lora_config, build_model
from st_btok.training.callback import half_precision_warning
from tests.backbones import total

BACKBONE = Path(__file__).parents[3] / "recipes" / "backbone"


def features(model):
    return [model.preprocess(["red kitten", "two dogs"]), model.preprocess(["a kitten", "dogs"])]


def two_steps(model, lr=1e-3):
    """A loop by hand, as in torch's own tutorials; the loss before each step."""
    loss, optimizer = BTokLoss(model), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        value = total(loss(features(model)))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def test_the_shipped_backbone_is_float32_and_trains_by_hand():
    """Its file is float16, to ship half the size; a loop in that type is NaN at the second step."""
    model = build_model(BACKBONE, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(
        torch.from_numpy(model.encode(["a", "red kitten", "b"], batch_size=3)[:1]),
        torch.from_numpy(model.encode(["a"])), atol=1e-6, rtol=0,
    )  # fmt: skip
    losses = two_steps(model, lr=1e-4)
    assert torch.isfinite(torch.tensor(losses)).all() and losses[1] < losses[0]


@pytest.mark.parametrize("loss_class", [BTokLoss, CachedBTokLoss])
def test_half_precision_is_warned_about_once_when_it_trains(qwen, caplog, loss_class):
    qwen.to(torch.bfloat16)
    loss = loss_class(qwen)
    with caplog.at_level(logging.WARNING, logger="st_btok"):
        with torch.no_grad():
            loss(features(qwen))
        assert not caplog.records, "evaluating loses nothing"
        loss(features(qwen))
        loss(features(qwen))
    assert len(caplog.records) == 1 and "bf16=True" in caplog.text and "in bfloat16" in caplog.text


def test_float32_frozen_and_master_copied_weights_are_not(qwen):
    assert half_precision_warning(qwen) is None
    qwen.half()
    assert "float16" in half_precision_warning(qwen)
    for parameter in qwen.parameters():
        parameter._hp_mapping = object()  # as DeepSpeed's ZeRO marks what it keeps in float32
    assert half_precision_warning(qwen) is None
    for parameter in qwen.parameters():
        del parameter._hp_mapping
    assert half_precision_warning(qwen.requires_grad_(False)) is None


def test_the_named_remedy_for_adapters_trains_what_rounding_would_lose(qwen):
    """Adapters on a bf16 base are bf16 too, and steps of 1e-5 are lost on rows of their size."""
    qwen.to(torch.bfloat16)
    qwen.add_adapter(btok_lora_config(qwen, r=2, dropout=0.0))
    rows = next(p for name, p in qwen.named_parameters() if "trainable_tokens_delta" in name)
    before = rows.detach().clone()
    two_steps(qwen, lr=1e-5)
    lost = (rows.detach() == before).float().mean().item()
    for p in qwen.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    assert half_precision_warning(qwen) is None
    before = rows.detach().clone()
    losses = two_steps(qwen, lr=1e-5)
    assert torch.isfinite(torch.tensor(losses)).all()
    kept = (rows.detach() != before).float().mean().item()
    assert lost > 0.5 and kept > 0.95
