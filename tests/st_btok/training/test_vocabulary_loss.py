"""The vocabulary's loss against torch's own cross entropy over whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from st_btok.training.vocabulary_loss import MAX_LOGITS, SummedCrossEntropy


def sample(dtype=torch.float64, tokens=7, vocabulary=50):
    states = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, 8, dtype=dtype, requires_grad=True)
    return states, head, torch.randint(0, vocabulary, (tokens,))


def linear_cross_entropy(states, head, labels, reduction="mean", softcap=None, max_logits=MAX_LOGITS):
    """In the form of torch's own."""
    total = SummedCrossEntropy(max_logits)(states, head, labels, softcap)
    return total / len(labels) if reduction == "mean" else total


def reference(states, head, labels, reduction="mean"):
    """What everybody writes: a linear layer, and torch's cross entropy."""
    return F.cross_entropy(F.linear(states, head), labels, reduction=reduction)


@pytest.mark.parametrize("max_logits", [2**25, 150, 1])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_value_and_gradients(max_logits, reduction):
    states, head, labels = sample()
    expected = reference(states, head, labels, reduction)
    found = linear_cross_entropy(states, head, labels, reduction=reduction, max_logits=max_logits)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(0.3 * expected, [states, head])
    for one, other in zip(torch.autograd.grad(0.3 * found, [states, head]), wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert other.abs().sum() > 0.1


@pytest.mark.parametrize("max_logits", [2**25, 150])
def test_capped_logits(max_logits):
    """As Gemma 2 caps them, in value and gradients; a cap of 1 bends most of them."""
    states, head, labels = sample()
    expected = F.cross_entropy(torch.tanh(F.linear(states, head)), labels)
    found = linear_cross_entropy(states, head, labels, softcap=1.0, max_logits=max_logits)
    torch.testing.assert_close(found, expected)
    assert abs(expected - reference(states, head, labels)) > 0.1
    wanted = torch.autograd.grad(expected, [states, head])
    for one, other in zip(torch.autograd.grad(found, [states, head]), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_it_can_be_dropped_for_torchs_own(reduction):
    """The same call, the same value and gradients."""
    found = []
    for function in (linear_cross_entropy, getattr(F, "linear_cross_entropy", None)):
        torch.manual_seed(1)
        states, head, labels = sample(torch.float32)
        value = function(states, head, labels, reduction=reduction)
        found.append([value.detach(), *torch.autograd.grad(value, [states, head])])
    torch.testing.assert_close(found[0], found[1])


def test_a_second_backward_pass_gives_the_same():
    states, head, labels = sample()
    loss = 0.5 * linear_cross_entropy(states, head, labels)
    first = [grad.clone() for grad in torch.autograd.grad(loss, [states, head], retain_graph=True)]
    for one, other in zip(torch.autograd.grad(loss, [states, head]), first, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen", ["", "states", "head"])
def test_parts_of_a_batch_share_the_gradient_of_the_head(frozen):
    """Three parts equal all tokens at once, also when the graph is kept and walked again; one tensor holds the sum."""
    states, head, labels = sample()
    for name, tensor in (("states", states), ("head", head)):
        tensor.requires_grad_(name != frozen)
    leaves = [tensor for tensor in (states, head) if tensor.requires_grad]
    whole = torch.autograd.grad(0.3 * linear_cross_entropy(states, head, labels, reduction="sum"), leaves)
    likelihood = SummedCrossEntropy()
    sizes = [1, 2, len(labels) - 3]
    parts = [likelihood(*part) for part in zip(states.split(sizes), [head] * 3, labels.split(sizes), strict=True)]
    total = 0.3 * torch.stack(parts).sum()
    torch.testing.assert_close(total, 0.3 * linear_cross_entropy(states, head, labels, reduction="sum"))
    for keep in (True, True, False):
        found = torch.autograd.grad(total, leaves, retain_graph=keep)
        torch.testing.assert_close(found, whole)
    if frozen != "head":
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["states", "head"])
def test_what_is_frozen_gets_no_gradient(frozen, dtype):
    states, head, labels = sample(dtype)
    {"states": states, "head": head}[frozen].requires_grad_(False)
    other = head if frozen == "states" else states
    linear_cross_entropy(states, head, labels, reduction="sum").backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, head)]
    wanted = torch.autograd.grad(reference(*exact, labels, "sum"), exact)[frozen == "states"]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(other.grad.double(), wanted, atol=tolerance, rtol=tolerance)
    assert (states if frozen == "states" else head).grad is None


def test_without_gradients_nothing_is_kept():
    states, head, labels = sample()
    with torch.no_grad():
        found = linear_cross_entropy(states, head, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found, reference(states, head, labels).detach())


def test_no_token_at_all():
    states, head, labels = sample()
    nll = linear_cross_entropy(states[:0], head, labels[:0], reduction="sum")
    assert nll == 0
    nll.backward()
    assert states.grad.abs().sum() == 0 and head.grad.abs().sum() == 0


class Sizes(TorchDispatchMode):
    """The size of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.found += [out.numel()] if isinstance(out, torch.Tensor) else []
        return out


def test_logits_never_exist_for_the_whole_batch():
    states, head, labels = torch.randn(300, 8), torch.randn(50, 8), torch.zeros(300, dtype=torch.long)
    with Sizes() as sizes:
        linear_cross_entropy(states.requires_grad_(), head.requires_grad_(), labels, max_logits=3000).backward()
    assert max(sizes.found) == 3000 < 300 * 50
    large = torch.randn(2**16, 2)  # at its own limit: 2**25 logits for 2**26
    with Sizes() as sizes, torch.no_grad():
        linear_cross_entropy(torch.randn(2**10, 2), large, torch.zeros(2**10, dtype=torch.long))
    assert max(sizes.found) <= 2**25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_with_a_float32_softmax(dtype):
    """A large vocabulary: its sum of exponentials is beyond float16, and likelihoods must not lose digits to it."""
    states, head, labels = sample(dtype, tokens=5, vocabulary=100_000)
    found = linear_cross_entropy(states, head, labels)
    assert found.dtype == torch.float32
    full = [tensor.detach().double().requires_grad_() for tensor in (states, head)]
    exact = reference(*full, labels)
    torch.testing.assert_close(found.detach().double(), exact.detach(), atol=5e-2, rtol=5e-3)
    found.backward()
    exact.backward()
    for own, other in zip((states, head), full, strict=True):
        assert own.grad.dtype == dtype
        scale = other.grad.abs().max()
        torch.testing.assert_close(own.grad.double() / scale, other.grad / scale, atol=1e-2, rtol=0)


def test_autocast_decides_the_type_of_the_products():
    states, head, labels = sample(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(states, head, labels)
    rounded = linear_cross_entropy(states.bfloat16(), head.bfloat16(), labels)
    assert torch.equal(found, rounded) and not torch.equal(found, linear_cross_entropy(states, head, labels))
    found.backward()
    assert states.grad.dtype == head.grad.dtype == torch.float32


def relative_errors(states, head, labels, dtype, scale, loss):
    """Largest error of the gradients of the mean, over the largest gradient, against float64."""
    own = [tensor.detach().float().requires_grad_() for tensor in (states, head)]
    with torch.autocast("cpu", dtype):
        value = loss(*own, labels)
    (scale * value).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, head)]
    reference(*exact, labels).backward()
    pairs = list(zip(own, exact, strict=True))
    errors = [((one.grad.double() / scale - two.grad).abs().max() / two.grad.abs().max()).item() for one, two in pairs]
    return [error if math.isfinite(error) else math.inf for error in errors]


def equal_labels(tokens=2048, size=50.0):
    """Thousands of equal labels on large states: the head's gradient sums to 100,000, beyond float16."""
    states = size * torch.sign(torch.randn(1, 16)) + 0.1 * torch.randn(tokens, 16)
    return states, 1e-3 * torch.randn(300, 16), torch.zeros(tokens, dtype=torch.long)


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**16])
def test_float16_is_finite_at_every_loss_scale(scale):
    """torch's own is up to 2^10; at 2^16, where a scaler starts, it overflows and the scaler has to come down."""
    sample = equal_labels()
    torchs = relative_errors(*sample, torch.float16, scale, reference)
    ours = relative_errors(*sample, torch.float16, scale, linear_cross_entropy)
    assert max(ours) < 5e-3 and (scale > 2**10) == math.isinf(torchs[1])
    assert ours[1] <= torchs[1] + 1e-5, "the head's gradient is at least as exact as torch's"


@pytest.mark.parametrize("max_logits", [2**25, 300 * 100])
def test_bfloat16_sums_the_head_in_float32(max_logits):
    """In chunks of 100 tokens a bfloat16 sum would round twenty times."""
    states, head = torch.randn(2048, 16), 0.5 * torch.randn(300, 16)
    sample = states, head, torch.randint(0, 300, (2048,))
    torchs = relative_errors(*sample, torch.bfloat16, 1.0, reference)
    ours = relative_errors(
        *sample, torch.bfloat16, 1.0, lambda *args: linear_cross_entropy(*args, max_logits=max_logits)
    )
    assert ours[0] < 1e-2 and ours[1] < 4e-3
    assert ours[1] <= 1.02 * torchs[1]


def test_float16_keeps_probabilities_that_it_can_not_hold():
    """Over a large vocabulary most probabilities are below 6e-8, the smallest float16; their sum counts."""
    states, head = torch.ones(512, 8), torch.zeros(1000, 8)
    head[0] = 2.2  # every other token has a probability of 2.3e-8
    labels = torch.zeros(512, dtype=torch.long)
    own = head.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(states, own, labels, reduction="sum").backward()
    exact = head.double().requires_grad_()
    reference(states.double(), exact, labels, "sum").backward()
    assert 0 < exact.grad[1, 0] / 512 < 6e-8
    torch.testing.assert_close(own.grad[1:].double(), exact.grad[1:], atol=0, rtol=2e-2)


def test_training_under_a_grad_scaler_follows_float32():
    """The scaler's own loop: its first scale overflows nothing, no step is skipped, the loss falls as in float32."""
    sample = equal_labels()
    curves = []
    for dtype in (torch.float16, None):
        states, head, labels = sample[0], sample[1].clone().requires_grad_(), sample[2]
        optimizer = torch.optim.SGD([head], lr=1e-6)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype is not None)
        curve = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = linear_cross_entropy(states, head, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            curve.append(loss.item())
        assert not scaler.is_enabled() or scaler.get_scale() == 2.0**16, "a skipped step would have halved it"
        curves.append(curve)
    assert curves[1][-1] < curves[1][0] - 1e-2
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=2e-3, rtol=0)
