"""GradCache for the vocabulary: the likelihood and its gradients are computed once, in the pass without gradients.

Under GradCache every row passes through the model twice, and a naive term would read the vocabulary twice as well: for
the value, which the loss has to return, and again for the gradient. But the gradient of the likelihood with respect to
the states that predict the targets is known in the first pass already, up to one factor that reaches every token
alike. So it is kept beside the embeddings' own cached gradients (a vector a target token), and the second pass, whose
states are the same, only sends it on. The gradient of an LM head that trains is summed over the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from st_btok.training.vocabulary_loss import condensation_nll


@dataclass
class CachedLikelihood:
    """What the first pass over one batch found out, by mini-batch.

    Attributes:
        nll: (M,) likelihoods, by the key of the mini-batch.
        state_grads: (M, D) their gradients with respect to the states.
        head_grad: (V, D) gradient of the sum over the whole batch; None for a frozen head.
    """

    nll: dict[Any, Tensor] = field(default_factory=dict)
    state_grads: dict[Any, Tensor | None] = field(default_factory=dict)
    head_grad: Tensor | None = None

    def read(self, key: Any, states: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        """First pass: as `condensation_nll`, and the gradients are kept.

        Args:
            key: Names the mini-batch.
            states: (M, D) last-layer states that predict the tokens.
            labels: (M,) token ids.
            head: (V, D) output embedding matrix.

        Returns:
            (M,) float32, in nats, without a graph.
        """
        leaf = states.detach().requires_grad_()
        # A leaf of its own each time (under FSDP the matrix is whole only while the model runs), one sum for all.
        matrix = head.detach().requires_grad_(head.requires_grad)
        matrix.grad = self.head_grad
        with torch.enable_grad():
            nll = condensation_nll(leaf, labels, matrix)
            nll.sum().backward()  # type: ignore[no-untyped-call]
        self.nll[key], self.state_grads[key], self.head_grad = nll.detach(), leaf.grad, matrix.grad
        return self.nll[key]

    def replay(self, key: Any, states: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        """Second pass: the kept values, with the kept gradients behind them.

        Args:
            key: Names the mini-batch.
            states: The states of the first pass, now with a graph.
            labels: Not used.
            head: The head of the first pass.

        Returns:
            (M,) float32. All of its elements, and those of the batch's other mini-batches, must get one same gradient.
        """
        first = next(iter(self.nll)) == key  # hands over the head's gradient for all mini-batches at once
        head_grad = self.head_grad if first else None
        return _Kept.apply(states, head, self.nll[key], self.state_grads[key], head_grad)  # type: ignore[no-any-return, no-untyped-call]


class _Kept(torch.autograd.Function):
    """Known values whose gradients are known too."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, nll: Tensor, state_grads: Tensor | None, head_grad: Tensor | None
    ) -> Tensor:
        ctx.state_grads, ctx.head_grad = state_grads, head_grad
        return nll.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        state_grads = None if ctx.state_grads is None else (ctx.state_grads * weights[:, None]).to(ctx.state_grads)
        head_grad = None if ctx.head_grad is None else (ctx.head_grad * weights[0]).to(ctx.head_grad)
        return state_grads, head_grad, None, None, None
