"""Muon in float32 against torch's own, whose products are bfloat16."""

from __future__ import annotations

import pytest
import torch

from recipes.toy.muon import Muon, orthogonalize


def train(optimizer, parameters):
    """Four updates by fixed gradients; one parameter has none."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for parameter in parameters[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def parameters():
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 12), (12, 8), (8, 12), (6, 6), (4, 4)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("exact", [True, False])
def test_equals_torchs_own(monkeypatch, exact):
    """To rounding where torch is made to compute in float32 too, and closely where it is not."""
    if exact:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    own, theirs = parameters(), parameters()
    found = train(Muon(own, **options), own)
    wanted = train(torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"), theirs)
    for before, one, other in zip(parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 if exact else 2e-2, rtol=0)
        assert (one - before).abs().max() > 0.1 or before.shape == (4, 4)
    assert torch.equal(found[-1], parameters()[-1]), "no gradient, no update"


def test_singular_values_come_near_one():
    x = orthogonalize(torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x)
    assert x.shape == (3, 10, 40) and 0.6 < values.min() and values.max() < 1.3


def test_only_matrices():
    with pytest.raises(ValueError, match=r"matrices only, got a parameter of shape \(3,\)"):
        Muon([torch.zeros(3, requires_grad=True)])
