"""`condensation_nll` against torch's own cross entropy over whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from st_btok import condensation_nll
from st_btok.training import vocabulary_loss


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
    monkeypatch.setattr(vocabulary_loss, "_MAX_LOGITS", max_logits)
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
    product = vocabulary_loss._product
    monkeypatch.setattr(vocabulary_loss, "_product", lambda x, y: sizes.append(len(x) * y.shape[1]) or product(x, y))
    monkeypatch.setattr(vocabulary_loss, "_MAX_LOGITS", 200)
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


def relative_errors(states, labels, head, dtype, scale, nll):
    """Largest error of the gradients of the mean, over the largest gradient, against float64."""
    own = [tensor.detach().float().requires_grad_() for tensor in (states, head)]
    with torch.autocast("cpu", dtype):
        loss = nll(own[0], labels, own[1]).mean()
    (scale * loss).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, head)]
    reference(exact[0], labels, exact[1]).mean().backward()
    pairs = list(zip(own, exact, strict=True))
    errors = [((one.grad.double() / scale - two.grad).abs().max() / two.grad.abs().max()).item() for one, two in pairs]
    return [error if math.isfinite(error) else math.inf for error in errors]


def whole_logits(states, labels, head):
    """What everybody writes: a linear layer under autocast, and torch's cross entropy."""
    return F.cross_entropy(F.linear(states, head), labels, reduction="none")


def equal_labels(tokens=2048, size=50.0):
    """Thousands of equal labels on large states: the head's gradient sums to 100,000, beyond float16."""
    states = size * torch.sign(torch.randn(1, 16)) + 0.1 * torch.randn(tokens, 16)
    return states, torch.zeros(tokens, dtype=torch.long), 1e-3 * torch.randn(300, 16)


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**16])
def test_float16_is_finite_at_every_loss_scale(scale):
    """torch's own is up to 2^10; at 2^16, where a scaler starts, it overflows and the scaler has to come down."""
    sample = equal_labels()
    torchs = relative_errors(*sample, torch.float16, scale, whole_logits)
    ours = relative_errors(*sample, torch.float16, scale, condensation_nll)
    assert max(ours) < 5e-3 and (scale > 2**10) == math.isinf(torchs[1])
    assert ours[1] <= torchs[1] + 1e-5, "the head's gradient is at least as exact as torch's"


@pytest.mark.parametrize("max_logits", [2**25, 300 * 100])
def test_bfloat16_sums_the_head_in_float32(monkeypatch, max_logits):
    """In chunks of 100 tokens a bfloat16 sum would round twenty times."""
    monkeypatch.setattr(vocabulary_loss, "_MAX_LOGITS", max_logits)
    states, head = torch.randn(2048, 16), 0.5 * torch.randn(300, 16)
    sample = states, torch.randint(0, 300, (2048,)), head
    torchs = relative_errors(*sample, torch.bfloat16, 1.0, whole_logits)
    ours = relative_errors(*sample, torch.bfloat16, 1.0, condensation_nll)
    assert ours[0] < 1e-2 and ours[1] < 4e-3
    assert ours[1] <= 1.02 * torchs[1]


def test_float16_weights_that_differ_under_a_large_scale():
    """Weights of 2^16 are beyond float16; they reach the head as shares of the largest."""
    states, labels, head = equal_labels(tokens=64, size=1.0)
    weights = 2.0**16 * torch.rand(64)
    own = [tensor.clone().requires_grad_() for tensor in (states, head)]
    with torch.autocast("cpu", torch.float16):
        (condensation_nll(own[0], labels, own[1]) * weights).sum().backward()
    exact = [tensor.double().requires_grad_() for tensor in (states, head)]
    (reference(exact[0], labels, exact[1]) * weights).sum().backward()
    for one, two in zip(own, exact, strict=True):
        assert ((one.grad - two.grad).abs().max() / two.grad.abs().max()) < 5e-3


def test_float16_keeps_probabilities_that_it_can_not_hold():
    """Over a large vocabulary most probabilities are below 6e-8, the smallest float16; their sum counts."""
    states, head = torch.ones(512, 8), torch.zeros(1000, 8)
    head[0] = 2.2  # every other token has a probability of 2.3e-8
    labels = torch.zeros(512, dtype=torch.long)
    own = head.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        condensation_nll(states, labels, own).sum().backward()
    exact = head.double().requires_grad_()
    reference(states.double(), labels, exact).sum().backward()
    assert 0 < exact.grad[1, 0] / 512 < 6e-8
    torch.testing.assert_close(own.grad[1:].double(), exact.grad[1:], atol=0, rtol=2e-2)


def test_training_under_a_grad_scaler_follows_float32():
    """The scaler's own loop: its first scale overflows nothing, no step is skipped, the loss falls as in float32."""
    sample = equal_labels()
    curves = []
    for dtype in (torch.float16, None):
        states, labels, head = sample[0], sample[1], sample[2].clone().requires_grad_()
        optimizer = torch.optim.SGD([head], lr=1e-6)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype is not None)
        curve = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = condensation_nll(states, labels, head).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            curve.append(loss.item())
        assert not scaler.is_enabled() or scaler.get_scale() == 2.0**16, "a skipped step would have halved it"
        curves.append(curve)
    assert curves[1][-1] < curves[1][0] - 1e-2
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=2e-3, rtol=0)
