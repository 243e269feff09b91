"""FSDP2 in one process, on the CPU: what `tests/gpu` does on a device."""

from __future__ import annotations

import copy

import pytest
import torch

from st_btok import BTokLoss, CachedBTokLoss
from tests.backbones import total
from tests.gpu.sharding import one_process, sharded
from tests.losses import assert_same_gradients, gradients


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_a_sharded_model_takes_the_same_step(qwen, kind):
    features = [qwen.preprocess(["a", "b", "c"]), qwen.preprocess(["d e", "f", "g h i"])]
    other = copy.deepcopy(qwen)
    plain = total(kind(qwen)([dict(column) for column in features]))
    plain.backward()
    with one_process("gloo"):
        loss = kind(other)  # before its model is sharded, as the Trainer has it
        sharded(other)
        value = total(loss([dict(column) for column in features]))
        value.backward()
        torch.testing.assert_close(value.detach(), plain.detach(), atol=1e-5, rtol=1e-5)
        found = {name: p.grad.full_tensor() for name, p in other.named_parameters() if p.grad is not None}
    assert_same_gradients(found, gradients(qwen), atol=2e-5)
