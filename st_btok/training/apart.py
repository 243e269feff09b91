"""The term read apart from the graph: its gradients are made beside its value, and its activations are gone at once.

On the K/V route a target is read in a call of its own, and all that this call takes from its source are the bottleneck
tokens' keys, values and last state. So everything behind them can be differentiated on the spot, a few targets at a
time, and beside the targets of other calls that are as long. What has to be kept until the backward pass is small: the
gradient of those keys, values and states, and one sum for each parameter, all up to the one factor (weight / tokens)
that every target token shares.

* In a plain step the activations of one part of the targets at a time stand beside those of the sources.
* Under GradCache the first pass, which needs the value of the term for the loss that it returns, makes the gradients
  as well; the second pass only sends them on. The targets are read once, and not twice.

The price is one more copy of the gradients of what trains, so this is done where that is smaller than the activations
that it replaces (`pays`): under adapters always, in full training of a large model on few targets not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from st_btok.training.buckets import call_cost, length_buckets
from st_btok.training.unread import NllOf, Unread

# Values that a decoder layer keeps for its backward pass, for each position, in multiples of its width: inputs and
# normed inputs of both halves, queries and outputs of attention, and three times an MLP of about three widths.
KEPT_BY_A_LAYER = 16


class Apart:
    """The term of one batch: targets wait for each other, are read by length, and enter the graph where they stood.

    Args:
        parameters: What may get a gradient from the targets; frozen ones are passed over.
        cost: From `call_cost`: what one more call costs.
        most: Positions to read at a time, more only for a single row; None: whatever saves padding.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], cost: int, most: int | None = None) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.grads: list[Tensor | None] = [None] * len(self.parameters)
        self.cost, self.most = cost, most
        self.total = torch.zeros(())  # the likelihood of all that was read
        self.waiting: dict[Hashable, Unread] = {}
        self.source_grads: dict[Hashable, list[Tensor]] = {}
        self.carrier: Hashable = None  # the call that hands over the parameters' gradients for all calls
        self.nll_of: NllOf | None = None

    @torch.compiler.disable
    def add(self, key: Hashable, unread: Unread, nll_of: NllOf) -> None:
        """Keep the targets of one call until they are read.

        Args:
            key: Names the call.
            unread: Its targets, and what they read.
            nll_of: What reads them; those of all calls do the same.
        """
        self.carrier = key if self.carrier is None else self.carrier
        self.waiting[key], self.nll_of = unread.detached(), nll_of

    @torch.compiler.disable
    def read(self) -> Tensor:
        """Value and gradients of all that waits, targets of similar length together.

        Returns:
            (), float32: the likelihood summed over all that was ever read, in nats, without a graph.
        """
        waiting, self.waiting = self.waiting, {}
        # Calls with pictures and calls of text alone may count positions on different axes.
        for axes in sorted({unread.last.ndim for unread in waiting.values()}):
            self._read({key: unread for key, unread in waiting.items() if unread.last.ndim == axes})
        return self.total

    def _read(self, pieces: dict[Hashable, Unread]) -> None:
        joined = Unread.joined(list(pieces.values()))
        grads = [torch.zeros_like(source) for source in joined.sources]
        for rows in length_buckets(joined.lengths, self.cost, self.most):
            part = joined.take(rows)
            with torch.enable_grad():
                nll = self.nll_of(part).sum()  # type: ignore[misc]
                found = torch.autograd.grad(nll, [*part.sources, *self.parameters], allow_unused=True)
            self.total = self.total + nll.detach().float()
            for total, grad in zip(grads, found, strict=False):
                if grad is not None:
                    total[rows] = grad
            for number, grad in enumerate(found[len(part.sources) :]):
                if grad is not None:
                    self._add(number, grad)
        sizes = [len(unread.targets) for unread in pieces.values()]
        shares = zip(*(grad.split(sizes) for grad in grads), strict=True)
        self.source_grads.update((key, list(share)) for key, share in zip(pieces, shares, strict=True))

    def _add(self, number: int, grad: Tensor) -> None:
        """Into the sum of a parameter, which is at least float32: small terms must not be lost in it."""
        total = self.grads[number]
        if total is None:
            self.grads[number] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            total += grad

    @torch.compiler.disable
    def enter(self, key: Hashable, sources: list[Tensor]) -> Tensor:
        """The place of a call's targets in the graph.

        Args:
            key: Names the call.
            sources: As they were in `add`, with a graph.

        Returns:
            (R,) float32 zeros, with the gradient of the likelihoods, which `read` has made by the backward pass. All
            of its elements, and those of the batch's other calls, must get one same gradient.
        """
        parameters = self.parameters if key == self.carrier else []
        return _Enter.apply(self, key, len(sources), *sources, *parameters)  # type: ignore[no-any-return, no-untyped-call]

    def later(self, unread: Unread, nll_of: NllOf) -> Tensor:
        """`add` and `enter`, for a pass that has a graph already.

        Args:
            unread: As for `add`.
            nll_of: As for `add`.

        Returns:
            As `enter`.
        """
        key = len(self.waiting)
        self.add(key, unread, nll_of)
        return self.enter(key, unread.sources)

    def times(self, factor: Tensor) -> list[Tensor | None]:
        """The parameters' gradients times a factor, in new tensors: what a backward pass gets may become `.grad`."""
        return [
            None if grad is None else (grad * factor.to(grad)).to(parameter.dtype)
            for grad, parameter in zip(self.grads, self.parameters, strict=True)
        ]


class _Enter(torch.autograd.Function):
    """Zeros in place of values that are known elsewhere, with the gradients of these values."""

    @staticmethod
    def forward(ctx: Any, apart: Apart, key: Hashable, sources: int, *tensors: Tensor) -> Tensor:
        ctx.apart, ctx.key, ctx.carries = apart, key, len(tensors) > sources
        return tensors[0].new_zeros(len(tensors[0]), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        factor = weights[0]
        sources = [grad * factor.to(grad) for grad in ctx.apart.source_grads[ctx.key]]
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


def pays(backbone: PreTrainedModel, head: nn.Parameter | None, tokens: int) -> bool:
    """Whether the gradients of what trains take less memory than the activations of the targets.

    Args:
        backbone: The backbone inside the `Transformer` module.
        head: The loss' own LM head, if it has one.
        tokens: Target tokens whose activations would be alive at a time in the graph.

    Returns:
        True where they do.
    """
    config = backbone.config.get_text_config(decoder=True)
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    if head is not None and head.requires_grad:
        trained += head.numel()
    return trained <= KEPT_BY_A_LAYER * width * layers * tokens


def reader_of(
    model: nn.Module, backbone: PreTrainedModel, head: nn.Parameter | None, tokens: int, most: int | None = None
) -> Apart | None:
    """What reads the targets of one batch apart, where that can be done and takes less memory.

    Args:
        model: The model of the loss, also wrapped.
        backbone: The backbone inside the `Transformer` module.
        head: The loss' own LM head, if it has one.
        tokens: Target tokens of the batch.
        most: As for `Apart`.

    Returns:
        The reader; None for targets as a part of the graph.
    """
    if not tokens or not torch.is_grad_enabled() or not can_read_apart(model, backbone):
        return None
    if not pays(backbone, head, tokens if most is None else min(tokens, most)):
        return None
    return Apart([*backbone.parameters(), *([] if head is None else [head])], call_cost(backbone), most)
