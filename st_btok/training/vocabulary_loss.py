"""The likelihood of target tokens over a vocabulary whose logits never exist for more than a chunk of tokens.

The gradients are made beside the value, while a chunk's logits are there: the vocabulary is read once forward and once
per gradient, where recomputing the logits in the backward pass would read it once more. What is kept until then is the
size of the states and, if the matrix trains, of the matrix in float32: what the backward pass would allocate in any
case where the weights are float32.

Products take operands in half precision and give float32, and the head's gradient is summed in float32: a sum over
thousands of tokens neither overflows float16 nor loses its small terms in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits alive at a time: 2**25 float32 values are 128 MiB, whatever the batch and the vocabulary.
_MAX_LOGITS = 2**25
_HALF = (torch.float16, torch.bfloat16)
# Slopes (at most 1) are raised by this before they become float16, whose smallest number is 6e-8: that is less than
# many probabilities over a large vocabulary, and a loss scale comes too late for gradients made in the forward pass.
_FLOAT16_RAISE = 2.0**10


@torch.compiler.disable
def condensation_nll(states: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Negative log-likelihood of each target token; logits exist for one chunk of tokens at a time.

    nll_i = -log softmax(head @ states_i)[labels_i]. Operands of products have the type of the states, or of autocast;
    their results, the softmax and all sums are at least float32.

    Args:
        states: (M, D) last-layer states that predict the tokens.
        labels: (M,) token ids.
        head: (V, D) output embedding matrix.

    Returns:
        (M,) float32, in nats.
    """
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    return _VocabularyNLL.apply(states, labels, head, dtype, torch.is_grad_enabled())  # type: ignore[no-any-return, no-untyped-call]


class _VocabularyNLL(torch.autograd.Function):
    """(M,) likelihoods; the gradient of the head is ready for the usual case that every token weighs the same."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, head: Tensor, dtype: torch.dtype, with_grad: bool) -> Tensor:
        precise = torch.promote_types(dtype, torch.float32)
        state_grads = torch.empty_like(states, dtype=precise) if with_grad and ctx.needs_input_grad[0] else None
        ctx.head_grad = torch.zeros_like(head, dtype=precise) if with_grad and ctx.needs_input_grad[2] else None
        nll = _chunked(states, labels, head.to(dtype), None, state_grads, ctx.head_grad)
        ctx.save_for_backward(states, labels, head, state_grads)
        ctx.dtype = dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        states, labels, head, state_grads = ctx.saved_tensors
        head_grad = None
        if ctx.needs_input_grad[2]:
            # Handed over, not copied: it may be as large as the model's largest matrix. A second call makes it anew.
            head_grad, ctx.head_grad = ctx.head_grad, None
            if head_grad is None or bool((weights != weights[:1]).any()):
                head_grad = torch.zeros_like(head, dtype=torch.promote_types(ctx.dtype, torch.float32))
                largest = weights.abs().max()  # taken out: under a loss scale the weights alone may exceed float16
                shares = weights / torch.where(largest > 0, largest, 1)
                _chunked(states, labels, head.to(ctx.dtype), shares, None, head_grad)
                head_grad *= largest
            elif len(weights):
                head_grad *= weights[0]
            head_grad = head_grad.to(head.dtype)
        if state_grads is not None:
            state_grads = (state_grads * weights[:, None]).to(states.dtype)
        return state_grads, None, head_grad, None, None


@torch.no_grad()
def _chunked(
    states: Tensor,
    labels: Tensor,
    head: Tensor,
    weights: Tensor | None,
    state_grads: Tensor | None,
    head_grad: Tensor | None,
) -> Tensor:
    """Likelihoods (M,); fills d nll_i / d states_i, and adds sum_i weights_i d nll_i / d head (weights 1 for None)."""
    nll = states.new_empty(len(states), dtype=torch.float32)
    size = max(1, _MAX_LOGITS // len(head))
    raised = _FLOAT16_RAISE if head.dtype == torch.float16 else 1.0
    with torch.autocast(states.device.type, enabled=False):
        for start in range(0, len(states), size):
            chunk = slice(start, start + size)
            inputs, right = states[chunk].to(head.dtype), labels[chunk, None]  # (m, D), (m, 1)
            scores = _product(inputs, head.T).float()  # (m, V)
            scores -= scores.amax(1, keepdim=True)
            own = scores.gather(1, right)
            total = scores.exp_().sum(1, keepdim=True)
            nll[chunk] = (total.log() - own).squeeze(1)
            if state_grads is None and head_grad is None:
                continue
            scores *= raised / total  # now the gradient of the logits: probabilities, and 1 less for the right token
            scores.scatter_add_(1, right, torch.full_like(total, -raised))
            if state_grads is not None:
                state_grads[chunk] = _product(scores.to(head.dtype), head) / raised
            if head_grad is not None:
                if weights is not None:
                    scores *= weights[chunk, None]
                _add_product(head_grad, scores.to(head.dtype).T, inputs, 1 / raised)
    return nll


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`; of half-precision matrices in float32, where the sum over the inner axis is float32 anyway."""
    if left.dtype not in _HALF:
        return left @ right
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """`total += alpha * left @ right`, in blocks of rows where the product needs memory of its own."""
    if left.dtype not in _HALF:
        total.addmm_(left, right, alpha=alpha)
        return
    size = max(1, _MAX_LOGITS // right.shape[1])
    for start in range(0, len(left), size):
        block = slice(start, start + size)
        total[block].add_(_product(left[block], right), alpha=alpha)
