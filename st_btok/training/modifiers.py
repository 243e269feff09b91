"""Whether a loss is being called by one of sentence-transformers' loss modifiers.

`MatryoshkaLoss`, `AdaptiveLayerLoss` and `Matryoshka2dLoss` call a loss once per dimension or layer, multiply what it
returns by a weight and add it up: they want a number, and a loss that returns its parts in a dict, as the Trainer
likes it, fails in them. They are known by what they put in place of the model's forward while they run. The cached
losses need none of this: there a modifier wraps `calculate_loss` and hands on what the loss returns.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.losses import adaptive_layer, matryoshka

from st_btok.model_parts import unwrap

_DECORATORS = (matryoshka.ForwardDecorator, adaptive_layer.ForwardDecorator)


def in_modifier(model: Any) -> bool:
    """Whether a loss modifier is at work on this model.

    Args:
        model: The model of the loss; wrapped (DDP, compile) or not.

    Returns:
        True between the modifier's first and last call of its loss.
    """
    layers = (model, unwrap(model))  # MatryoshkaLoss decorates what it was given, AdaptiveLayerLoss what is inside
    return any(isinstance(vars(layer).get("forward"), _DECORATORS) for layer in layers)
