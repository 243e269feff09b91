"""The condensation mask: target tokens see the bottleneck tokens and earlier target tokens, never the input itself.

A sequence is `[input][BToks][target]`. The mask is the backbone's own (causal, sliding window, padding, ...) and not
(query position is target and key position is input) (paper, section 3.2). It enters through transformers' attention
interface: a registered attention name that computes as SDPA does, whose mask function ANDs this predicate. The name is
set only while a forward pass runs, on the text config only, so nothing of it reaches a saved config or a vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, sdpa_mask

from st_btok.model_parts import CHECKPOINTING, attention_set, supports_sdpa

CONDENSATION_ATTENTION = "btok_condensation"
# What a position is; padding needs no segment of its own, the backbone's padding mask covers it.
INPUT, BTOK, TARGET = 0, 1, 2

# The one piece of hidden state: mask functions get positions, not token roles. Read by `_masked_sdpa` only.
_SEGMENTS: ContextVar[Tensor | None] = ContextVar("btok_segments", default=None)


def condensation_mask(segments: Tensor) -> Callable[[Any, Any, Any, Any], Any]:
    """The predicate of the condensation mask.

    Args:
        segments: (B, T) integers: `INPUT`, `BTOK` or `TARGET` of each position.

    Returns:
        A function of (batch, head, query, key) index tensors that is False where a target position would read an
        input position, and True elsewhere; it broadcasts as transformers' mask functions do.
    """

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ~((segments[batch, query] == TARGET) & (segments[batch, key] == INPUT))

    return allowed


def _masked_sdpa(mask_function: Callable, **kwargs: Any) -> Tensor | None:
    segments = _SEGMENTS.get()
    if segments is None:
        return sdpa_mask(mask_function=mask_function, **kwargs)
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(mask_function=and_masks(mask_function, condensation_mask(segments)), **kwargs)


def register_condensation_attention() -> None:
    """Make the condensation attention known to transformers; calling it again changes nothing."""
    AttentionInterface.register(CONDENSATION_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(CONDENSATION_ATTENTION, _masked_sdpa)


@contextmanager
def condensation_attention(model: PreTrainedModel, segments: Tensor) -> Iterator[None]:
    """Run the forward passes inside this block under the condensation mask.

    Gradient checkpointing is safe: a layer that is recomputed in `backward` gets the finished mask, and the attention
    that goes with it (eager attention would add a mask of booleans, flash attention takes it for a mask of padding).

    Args:
        model: The backbone; its text config is switched and switched back.
        segments: (B, T) segment of each position of the one batch that is run inside.

    Yields:
        Nothing.

    Raises:
        ValueError: If the backbone can't use SDPA attention, which the mask is built on.
    """
    config = model.config.get_text_config(decoder=True)
    if not supports_sdpa(model):
        raise ValueError(
            f"the attention route needs a backbone that supports SDPA attention, {type(model).__name__} does not."
        )
    register_condensation_attention()
    token = _SEGMENTS.set(segments)
    try:
        with attention_set(CONDENSATION_ATTENTION, config), _recomputed_alike(model, config):
            yield
    finally:
        _SEGMENTS.reset(token)


@contextmanager
def _recomputed_alike(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[None]:
    """What is checkpointed inside this block is recomputed behind it, under the name that it was computed under."""
    name = CHECKPOINTING
    functions = [(module, vars(module)[name]) for module in model.modules() if name in vars(module)]

    def under_the_name(layer: Callable, *args: Any, **kwargs: Any) -> Any:
        with attention_set(CONDENSATION_ATTENTION, config):
            return layer(*args, **kwargs)

    def checkpoint(function: Callable, layer: Callable, *args: Any, **kwargs: Any) -> Any:
        return function(partial(under_the_name, layer), *args, **kwargs)

    for module, function in functions:
        setattr(module, name, partial(checkpoint, function))
    try:
        yield
    finally:
        for module, function in functions:
            setattr(module, name, function)
