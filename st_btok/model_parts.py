"""Questions asked of a model: its transformer and BToks, tokenizer, embedding matrix, media tokens.

They are asked from every room, so they stand below all of them, next to the tokens' names. Nothing here changes a
model.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from st_btok.tokens import btok_ids


def find_btoks(model: SentenceTransformer) -> tuple[Transformer, list[int]]:
    """The Transformer module of a BTok model and its K token ids.

    Args:
        model: A model from `build_model`, or a saved one loaded with `SentenceTransformer(path)`.

    Returns:
        The first module and the ids in order.

    Raises:
        ValueError: If the model's first module is not a `Transformer`, or its tokenizer has no BToks.
    """
    transformer = model[0]
    if not isinstance(transformer, Transformer):
        raise ValueError(f"the first module must be a Transformer, got {type(transformer).__name__}.")
    ids = btok_ids(tokenizer_of(transformer))
    if not ids:
        raise ValueError(
            "the model's tokenizer has no bottleneck tokens. Build the model with st_btok.build_model(backbone)."
        )
    return transformer, ids


def unwrap(model: Any) -> SentenceTransformer:
    """The SentenceTransformer inside what training wraps around it (DDP, compile)."""
    while not isinstance(model, SentenceTransformer):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def tokenizer_of(transformer: Transformer) -> PreTrainedTokenizerBase:
    """The tokenizer of a Transformer module.

    Args:
        transformer: A module of sentence-transformers.

    Returns:
        The tokenizer, the processor's own where there is a processor.

    Raises:
        ValueError: If the module has none, as for a pure vision or audio model.
    """
    if transformer.tokenizer is None:
        raise ValueError(
            f"the backbone must be a language model with a tokenizer; {type(transformer.model).__name__} has none."
        )
    return transformer.tokenizer


def embedding_matrix(model: PreTrainedModel) -> Tensor:
    """The live (V, D) input embedding matrix, also under adapters and FSDP.

    Under `trainable_token_indices` this is the base matrix, whose K BTok rows are the untrained ones. As an LM head
    that is what is wanted: BToks are never generated.

    Args:
        model: The backbone.

    Returns:
        The weight; a parameter, or under FSDP the view that is whole while the model runs.
    """
    module: Any = model.get_input_embeddings()
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module.weight


def media_tokens(transformer: Transformer) -> dict[str, int]:
    """Ids of the placeholder tokens of a backbone, by kind of medium.

    Args:
        transformer: The model's first module.

    Returns:
        `"image"`, `"video"`, `"audio"`, as far as the backbone has them.
    """
    named = {kind: getattr(transformer.config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    return {kind: token for kind, token in named.items() if token is not None}
