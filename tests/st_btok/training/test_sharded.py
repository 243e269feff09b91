"""FSDP2 in one process, on the CPU: what `tests/gpu` does on a device."""

from __future__ import annotations

import copy

import pytest
import torch

from st_btok import BTokLoss, CachedBTokLoss
from st_btok.training import apart
from tests.backbones import total
from tests.gpu.sharding import one_process, sharded


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_a_sharded_model_takes_the_same_step(qwen, monkeypatch, kind):
    monkeypatch.setattr(apart, "KEPT_BY_A_LAYER", 10**9)
    features = [qwen.preprocess(["a", "b", "c"]), qwen.preprocess(["d e", "f", "g h i"])]
    other = copy.deepcopy(qwen)
    plain = total(kind(qwen)([dict(column) for column in features]))
    plain.backward()
    with one_process("gloo"):
        loss = kind(other)  # before its model is sharded, as the Trainer has it
        sharded(other)
        assert getattr(loss, "loss", loss).apart([[torch.tensor([1, 2])], None]) is None, "hooks count on one pass"
        value = total(loss([dict(column) for column in features]))
        value.backward()
        torch.testing.assert_close(value.detach(), plain.detach(), atol=1e-5, rtol=1e-5)
        found = {name: p.grad.full_tensor() for name, p in other.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in qwen.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        size = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found[name] / size, grad / size, atol=2e-5, rtol=0, msg=name)
