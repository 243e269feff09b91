"""The term read apart from the graph: its gradients are made beside its value, and its activations are gone at once.

On the K/V route a target is read in a call of its own, and all that this call takes from its source are the bottleneck
tokens' keys, values and last state. So everything behind them can be differentiated on the spot, a few targets at a
time. What has to be kept until the backward pass is small: the gradient of those keys, values and states, and one sum
for each parameter, all up to the one factor (weight / tokens) that every target token shares.

* In a plain step the activations of the targets are never alive beside those of their sources.
* Under GradCache the first pass, which needs the value of the term for the loss that it returns, makes the gradients
  as well; the second pass only sends them on. The targets are read once, and not twice.

The price is one more copy of the gradients of what trains, so this is done where that is smaller than the activations
that it replaces (`pays`): under adapters always, in full training of a large model on few targets not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# Values that a decoder layer keeps for its backward pass, for each position, in multiples of its width: inputs and
# normed inputs of both halves, queries and outputs of attention, and three times an MLP of about three widths.
KEPT_BY_A_LAYER = 16


# From what targets read of their sources, and the numbers of these rows, the rows' likelihoods (r,).
Likelihoods = Callable[[list[Tensor], Tensor], Tensor]


@dataclass
class Known:
    """One call's likelihoods, and the gradient of their sum with respect to what the call took from its source."""

    nll: Tensor
    source_grads: list[Tensor]


class Apart:
    """The term of one batch, whose parts are read at once and enter the graph later.

    Args:
        parameters: What may get a gradient from the targets; frozen ones are passed over.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.grads: list[Tensor | None] = [None] * len(self.parameters)
        self.known: dict[Any, Known] = {}

    @torch.compiler.disable
    def read(
        self,
        key: Any,
        sources: list[Tensor],
        parts: Sequence[Tensor],
        nll_of: Callable[[list[Tensor], Tensor], Tensor],
    ) -> Tensor:
        """Value and gradients, part by part.

        Args:
            key: Names the call.
            sources: What the targets read, each (R, ...).
            parts: Row numbers to read together; all parts hold every row once.
            nll_of: From the sources of some rows, and their numbers, the (r,) likelihoods of these rows.

        Returns:
            (R,) float32, in nats, without a graph.
        """
        nll = torch.zeros(len(sources[0]), device=sources[0].device)
        source_grads = [torch.zeros_like(source) for source in sources]
        for rows in parts:
            taken = [source.detach()[rows].requires_grad_() for source in sources]
            with torch.enable_grad():
                values = nll_of(taken, rows)
                found = torch.autograd.grad(values.sum(), [*taken, *self.parameters], allow_unused=True)
            nll[rows] = values.detach().float()
            for total, grad in zip(source_grads, found, strict=False):
                if grad is not None:
                    total[rows] = grad
            for number, grad in enumerate(found[len(taken) :]):
                if grad is not None:
                    self._add(number, grad)
        self.known[key] = Known(nll, source_grads)
        return nll

    def _add(self, number: int, grad: Tensor) -> None:
        """Into the sum of a parameter, which is at least float32: small terms must not be lost in it."""
        total = self.grads[number]
        if total is None:
            self.grads[number] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad

    @torch.compiler.disable
    def enter(self, key: Any, sources: list[Tensor]) -> Tensor:
        """What `read` has found under this key, as a part of the graph.

        Args:
            key: Names the call.
            sources: As they were in `read`, now with a graph.

        Returns:
            (R,) float32. All of its elements, and those of the batch's other calls, must get one same gradient.
        """
        carries = next(iter(self.known)) == key  # hands over the parameters' gradients for all calls
        parameters = self.parameters if carries else []
        return _Enter.apply(self, self.known[key], len(sources), *sources, *parameters)  # type: ignore[no-any-return, no-untyped-call]

    def at_once(self, sources: list[Tensor], parts: Sequence[Tensor], nll_of: Likelihoods) -> Tensor:
        """`read` and `enter`, for a pass that has a graph already.

        Args:
            sources: As for `read`.
            parts: As for `read`.
            nll_of: As for `read`.

        Returns:
            As `enter`.
        """
        key = len(self.known)
        self.read(key, sources, parts, nll_of)
        return self.enter(key, sources)

    def times(self, factor: Tensor) -> list[Tensor | None]:
        """The parameters' gradients times a factor, in new tensors: what a backward pass gets may become `.grad`."""
        return [
            None if grad is None else (grad * factor.to(grad)).to(parameter.dtype)
            for grad, parameter in zip(self.grads, self.parameters, strict=True)
        ]


class _Enter(torch.autograd.Function):
    """Known values whose gradients are known too."""

    @staticmethod
    def forward(ctx: Any, apart: Apart, known: Known, sources: int, *tensors: Tensor) -> Tensor:
        ctx.apart, ctx.known, ctx.carries = apart, known, len(tensors) > sources
        return known.nll.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        factor = weights[0]
        sources = [grad * factor.to(grad) for grad in ctx.known.source_grads]
        parameters = ctx.apart.times(factor) if ctx.carries else []
        return (None, None, None, *sources, *parameters)


def is_alone(backbone: PreTrainedModel) -> bool:
    """Whether no hook of a sharded or replicated model counts on passes and backward passes in one order.

    Args:
        backbone: The backbone inside the `Transformer` module.

    Returns:
        False for several processes and for sharded weights.
    """
    return get_world_size() == 1 and not any(isinstance(parameter, DTensor) for parameter in backbone.parameters())


def can_read_apart(model: nn.Module, backbone: PreTrainedModel) -> bool:
    """Whether the targets of this call can be read in a call of their own whose gradients are made on the spot.

    Args:
        model: The model of the loss, also wrapped.
        backbone: The backbone inside the `Transformer` module.

    Returns:
        False where `is_alone` is; for float16, whose small gradients need the loss scale that is known in the backward
        pass only; under gradient checkpointing, which keeps no keys and values; and for a compiled model.
    """
    if not is_alone(backbone) or isinstance(model, OptimizedModule) or model._compiled_call_impl is not None:
        return False
    if any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        return False
    kind = backbone.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        return False
    return not any(parameter.dtype == torch.float16 for parameter in backbone.parameters())


def pays(backbone: PreTrainedModel, head: nn.Parameter | None, tokens: float) -> bool:
    """Whether the gradients of what trains take less memory than the activations of the targets.

    Args:
        backbone: The backbone inside the `Transformer` module.
        head: The loss' own LM head, if it has one.
        tokens: Target tokens whose activations would be alive at a time.

    Returns:
        True where they do.
    """
    config = backbone.config.get_text_config(decoder=True)
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    if head is not None and head.requires_grad:
        trained += head.numel()
    return trained <= KEPT_BY_A_LAYER * width * layers * tokens


def reader_of(model: nn.Module, backbone: PreTrainedModel, head: nn.Parameter | None, tokens: float) -> Apart | None:
    """What reads the targets of one batch apart, where that can be done and takes less memory.

    Args:
        model: The model of the loss, also wrapped.
        backbone: The backbone inside the `Transformer` module.
        head: The loss' own LM head, if it has one.
        tokens: Target tokens that are read together.

    Returns:
        The reader; None for targets as a part of the graph.
    """
    if not tokens or not torch.is_grad_enabled() or not pays(backbone, head, tokens):
        return None
    if not can_read_apart(model, backbone):
        return None
    return Apart([*backbone.parameters(), *([] if head is None else [head])])
