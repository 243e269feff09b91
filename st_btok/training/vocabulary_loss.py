"""Cross entropy over a large vocabulary whose logits never exist for more than a chunk of tokens.

`torch.nn.functional.linear_cross_entropy` is the same sum, which releases of torch that users still run do not have,
and which rounds its value under bfloat16; once neither holds, it can take this file's place.

The gradients are computed together with the value, while a chunk's logits exist. Recomputing the logits in the
backward pass would multiply by the vocabulary once more. Products of half-precision operands give float32, and sums
are float32: a sum over thousands of tokens neither overflows float16 nor loses its small terms in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from st_btok.model_parts import graph_is_kept

# Logits alive at a time: 2**25 float32 values are 128 MiB, whatever the batch and the vocabulary.
MAX_LOGITS = 2**25
# Gradients of logits (at most 1) are multiplied by this before they become float16, and divided again behind the
# product. The smallest float16 is 6e-8, more than many probabilities over a large vocabulary.
_FLOAT16_FACTOR = 2.0**10


@dataclass
class KnownNLL:
    """The summed cross entropy of some tokens, and its gradients."""

    value: Tensor  # scalar
    input_grad: Tensor | None  # (M, D)
    weight_grad: Tensor | None  # (V, D); waits for the backward pass, and later parts may still be added to it

    def with_graph(self, input: Tensor, linear_weight: Tensor) -> Tensor:
        """The value as a node of the graph, whose backward pass sends the known gradients on."""
        return _Known.apply(input, linear_weight, self)  # type: ignore[no-any-return, no-untyped-call]


class SummedCrossEntropy:
    """-sum_i log softmax(linear_weight @ input_i)[target_i] in nats, without the whole matrix of logits.

    A scalar, float32, or float64 for float64 inputs. Operands of products have the type of `input`, or of autocast.
    Their results, the softmax and all sums are at least float32. `softcap` squeezes logits into -softcap to softcap.

    Called for several parts of a batch, whose values must be summed: then the backward pass brings one factor for all
    of them, their gradients of the matrix share one tensor, and the node of the first part sends the whole of it on.
    """

    def __init__(self, max_logits: int = MAX_LOGITS) -> None:
        self.max_logits = max_logits
        self._first: KnownNLL | None = None

    def known(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        softcap: float | None,
        needs_grad: tuple[bool, bool],
    ) -> KnownNLL:
        """Value and gradients of one more part; the first part has the gradient of the matrix for all of them."""
        so_far = None if self._first is None else self._first.weight_grad
        found = sum_with_gradients(input, linear_weight, target, *needs_grad, so_far, self.max_logits, softcap)
        if self._first is None:
            self._first = found
        else:
            found.weight_grad = None
        return found

    @torch.compiler.disable
    def __call__(self, input: Tensor, linear_weight: Tensor, target: Tensor, softcap: float | None = None) -> Tensor:
        """Of (M, D) states that predict (M,) token ids, through a (V, D) output embedding matrix."""
        graph = torch.is_grad_enabled()
        needs_grad = graph and input.requires_grad, graph and linear_weight.requires_grad
        return self.known(input, linear_weight, target, softcap, needs_grad).with_graph(input, linear_weight)


class _Known(torch.autograd.Function):
    """A known value with known gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, known: KnownNLL) -> Tensor:
        ctx.save_for_backward(known.value, known.input_grad)
        ctx.known = known
        ctx.dtypes = input.dtype, weight.dtype
        return known.value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, input_grad = ctx.saved_tensors
        weight_grad = ctx.known.weight_grad
        if input_grad is not None:
            input_grad = (input_grad * grad.to(input_grad)).to(ctx.dtypes[0])
        if weight_grad is not None and graph_is_kept():
            weight_grad = weight_grad * grad.to(weight_grad)
        elif weight_grad is not None:  # nobody asks again: in place and handed on, so that (V, D) exists once
            weight_grad.mul_(grad.to(weight_grad))
            ctx.known.weight_grad = None
        return input_grad, None if weight_grad is None else weight_grad.to(ctx.dtypes[1]), None


@torch.no_grad()
def sum_with_gradients(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    input_needs_grad: bool,
    weight_needs_grad: bool,
    weight_grad: Tensor | None = None,
    max_logits: int = MAX_LOGITS,
    softcap: float | None = None,
) -> KnownNLL:
    """Value and gradients of the summed cross entropy, chunk by chunk; see `SummedCrossEntropy`.

    `weight_grad` is a (V, D) tensor that the gradient of the matrix is added to. Default: a new one.
    """
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    precise = torch.promote_types(dtype, torch.float32)
    factor = _FLOAT16_FACTOR if dtype == torch.float16 else 1.0
    matrix, value = linear_weight.to(dtype), torch.zeros((), dtype=precise, device=input.device)
    input_grad = torch.empty_like(input, dtype=precise) if input_needs_grad else None
    if not weight_needs_grad:
        weight_grad = None
    elif weight_grad is None:
        weight_grad = torch.zeros_like(linear_weight, dtype=precise)
    size = max(1, max_logits // len(linear_weight))
    with torch.autocast(device, enabled=False):
        for start in range(0, len(input), size):
            chunk = slice(start, start + size)
            states, right = input[chunk].to(dtype), target[chunk, None]  # (m, D), (m, 1)
            # -log softmax: log sum exp(logits) - logit of the right token. The largest logit is taken off before.
            logits = _product(states, matrix.T)  # (m, V)
            if softcap is not None:
                squeezed = logits.div_(softcap).tanh_()
                slope, logits = 1 - squeezed.square(), squeezed * softcap
            logits -= logits.amax(1, keepdim=True)
            right_logit = logits.gather(1, right)
            total = logits.exp_().sum(1, keepdim=True)
            value += (total.log() - right_logit).sum()
            if input_grad is None and weight_grad is None:
                continue
            # Gradient of the logits: softmax, less 1 at the right token.
            grad = logits.mul_(factor / total)
            grad.scatter_add_(1, right, torch.full_like(total, -factor))
            if softcap is not None:
                grad *= slope
            grad = grad.to(dtype)
            if input_grad is not None:
                input_grad[chunk] = _product(grad, matrix) / factor
            if weight_grad is not None:
                _add_product(weight_grad, grad.T, states, 1 / factor, max_logits)
    return KnownNLL(value, input_grad, weight_grad)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`; of half-precision matrices in float32, where the sum over the inner axis is float32 anyway."""
    if left.dtype not in (torch.float16, torch.bfloat16):
        return left @ right
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float, max_values: int) -> None:
    """`total += factor * left @ right`, in blocks of rows where the product needs memory of its own."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
        return
    size = max(1, max_values // right.shape[1])
    for rows, block in zip(total.split(size), left.split(size), strict=True):
        rows.add_(_product(block, right), alpha=factor)
