"""`condensation_nll` against torch's own cross entropy over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from st_btok import condensation_nll
from st_btok.training import likelihood


def sample(dtype=torch.float64, tokens=7, vocabulary=50):
    states = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, 8, dtype=dtype, requires_grad=True)
    return states, torch.randint(0, vocabulary, (tokens,)), head


def reference(states, labels, head):
    return F.cross_entropy((states @ head.T).float(), labels, reduction="none")


@pytest.mark.parametrize("max_logits", [2**25, 150, 1])
@pytest.mark.parametrize("weighting", ["sum", "weighted"])
def test_value_and_gradients(monkeypatch, max_logits, weighting):
    """Tokens of equal weight, whose head gradient is made in the forward pass, and of unequal weight."""
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", max_logits)
    states, labels, head = sample()
    weights = torch.full((7,), 0.3) if weighting == "sum" else torch.rand(7)
    expected = reference(states, labels, head)
    found = condensation_nll(states, labels, head)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [states, head])
    for one, other in zip(torch.autograd.grad((found * weights).sum(), [states, head]), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert other.abs().sum() > 1


def test_a_second_backward_pass_gives_the_same():
    states, labels, head = sample()
    loss = 0.5 * condensation_nll(states, labels, head).sum()
    first = [grad.clone() for grad in torch.autograd.grad(loss, [states, head], retain_graph=True)]
    for one, other in zip(torch.autograd.grad(loss, [states, head]), first, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["states", "head"])
def test_what_is_frozen_gets_no_gradient(frozen):
    states, labels, head = sample()
    {"states": states, "head": head}[frozen].requires_grad_(False)
    other = head if frozen == "states" else states
    condensation_nll(states, labels, head).sum().backward()
    wanted = torch.autograd.grad(reference(states, labels, head).sum(), other)[0]
    torch.testing.assert_close(other.grad, wanted, atol=1e-6, rtol=1e-5)
    assert (states if frozen == "states" else head).grad is None


def test_without_gradients_nothing_is_kept():
    states, labels, head = sample()
    with torch.no_grad():
        found = condensation_nll(states, labels, head)
    assert not found.requires_grad
    torch.testing.assert_close(found, reference(states, labels, head).detach())


def test_no_token_at_all():
    states, labels, head = sample()
    nll = condensation_nll(states[:0], labels[:0], head)
    assert nll.shape == (0,)
    nll.sum().backward()
    assert states.grad.abs().sum() == 0 and head.grad.abs().sum() == 0


def test_logits_never_exist_for_the_whole_batch(monkeypatch):
    sizes = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: sizes.append(len(x) * len(w)) or linear(x, w))
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 200)
    condensation_nll(torch.randn(30, 8), torch.zeros(30, dtype=torch.long), torch.randn(50, 8))
    assert len(sizes) == 8 and max(sizes) <= 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_with_a_float32_softmax(dtype):
    """A large vocabulary: its sum of exponentials is beyond float16, and likelihoods must not lose digits to it."""
    states, labels, head = sample(dtype, tokens=5, vocabulary=100_000)
    found = condensation_nll(states, labels, head)
    assert found.dtype == torch.float32
    exact = reference(states.detach().double(), labels, head.detach().double())
    torch.testing.assert_close(found.detach(), exact, atol=5e-2, rtol=5e-3)
    (1e-2 * found).sum().backward()
    full = [tensor.detach().double().requires_grad_() for tensor in (states, head)]
    (1e-2 * reference(full[0], labels, full[1])).sum().backward()
    for own, other in zip((states, head), full, strict=True):
        assert own.grad.dtype == dtype
        scale = other.grad.abs().max()
        torch.testing.assert_close(own.grad.double() / scale, other.grad / scale, atol=1e-2, rtol=0)


def test_autocast_decides_the_type_of_the_products():
    states, labels, head = sample(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = condensation_nll(states, labels, head)
    rounded = condensation_nll(states.bfloat16(), labels, head.bfloat16())
    assert torch.equal(found, rounded) and not torch.equal(found, condensation_nll(states, labels, head))
    found.sum().backward()
    assert states.grad.dtype == head.grad.dtype == torch.float32
