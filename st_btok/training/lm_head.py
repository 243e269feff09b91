"""The LM head that the condensation loss reads; never part of the saved embedder."""

from __future__ import annotations

import logging

from torch import Tensor, nn
from transformers import PreTrainedModel

from st_btok.model_parts import (
    LogitRule,
    checkpoint_head,
    embedding_matrix,
    generation_class,
    logit_rule,
    remembered_commit,
)

logger = logging.getLogger(__name__)


def output_embeddings(model: PreTrainedModel, lm_head: nn.Module | Tensor | str | None = None) -> Tensor:
    """The (V, D) matrix that turns last-layer states into logits.

    A BTok model holds the backbone without its LM head. Where the head is tied to the input embeddings, their matrix
    is the head: the live parameter. Else (most 7B models) it is read from the checkpoint that the backbone came from,
    by the class that transformers builds for generation, and stays out of the saved embedder. `lm_head` is an LM head
    (module or matrix) to use, or the name or path of a checkpoint to read it from. A `ValueError` if it is not tied
    and can't be found.
    """
    if isinstance(lm_head, nn.Module):
        lm_head = lm_head.get_parameter("weight")
    if isinstance(lm_head, Tensor):
        return lm_head
    config, embeddings = model.config, embedding_matrix(model)
    source = lm_head or config.name_or_path
    tied = lm_head is None and getattr(config, "tie_word_embeddings", False)
    generating = generation_class(config)
    if tied and (generating is None or generating.__name__ not in (config.architectures or ())):
        return embeddings  # saved without a head, as `build_model` found it: nothing to ask there
    head, reason = None, f"{source!r} holds none"
    commit = remembered_commit(config) if source == config.name_or_path else None
    try:
        if source:
            head, tied = checkpoint_head(str(source), config, **({"revision": commit} if commit else {}))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
    if tied and lm_head is None:
        return embeddings
    if head is None:
        raise ValueError(
            f"the backbone's LM head is not tied to its embeddings, and must be found: {reason}. "
            'Pass BTokLoss(..., lm_head="the backbone\'s name or path") or lm_head=full_model.get_output_embeddings().'
        )
    return head.to(device=embeddings.device, dtype=embeddings.dtype)


def own_head(model: PreTrainedModel, lm_head: nn.Module | Tensor | str | None) -> nn.Parameter | None:
    """An untied LM head as a frozen parameter of the loss, which moves along with it; None for a tied one."""
    head = output_embeddings(model, lm_head)
    if head is embedding_matrix(model):
        return None
    return nn.Parameter(head.detach(), requires_grad=False)


def own_logits(model: PreTrainedModel) -> LogitRule:
    """The backbone's `logit_rule`; where it can't be found out, a warning, and the products are the logits."""
    try:
        return logit_rule(model.config)
    except ValueError as error:
        logger.warning("The condensation loss takes the products of states and LM head for logits: %s", error)
        return LogitRule()
