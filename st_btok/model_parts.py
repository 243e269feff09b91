"""Questions asked of a model: its transformer and BToks, tokenizer, embedding matrix, LM head, media tokens.

They are asked from every room, so they stand below all of them, next to the tokens' names. Nothing here changes a
model.
"""

from __future__ import annotations

from typing import Any

import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import transformer as transformer_module
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import logging

from st_btok.tokens import btok_ids

# Where transformers looks for the class that generates. Text comes last: some configs with a vision tower stand there
# too, for a class that reads the language model alone (Qwen3.5).
GENERATING = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
# Features that carry the content of rows to the losses; see `training/content.py`. No model reads them.
CONTENT_KEYS = ("content_ids", "content_media")


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


def generation_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers builds from a config in order to generate, LM head included.

    Args:
        config: Of a backbone, with or without its LM head.

    Returns:
        The class that the config itself names if it has a head, else the one of transformers' mappings for
        image-text-to-text, multimodal and causal language models; None where there is none.
    """
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
            if named.config_class is type(config):
                return named
    found: Any = next((mapping[type(config)] for mapping in GENERATING if type(config) in mapping), None)
    return found


def checkpoint_head(source: str, config: PreTrainedConfig, **hub: Any) -> tuple[Tensor | None, bool]:
    """The LM head of a checkpoint, as transformers loads it for generation.

    The generating class is loaded without any part but its two matrices, so that names of keys, their conversions and
    the question whether both are tied are answered by transformers itself: a head that the checkpoint holds wins over
    a config that says tied, if it differs from the embeddings.

    Args:
        source: Name or path of the checkpoint.
        config: Of the backbone, whose class says which class generates.
        **hub: Arguments of `from_pretrained` that say where the checkpoint lies, such as `revision` or `token`.

    Returns:
        The matrix (V, D) on the CPU, in the checkpoint's own type, and whether it is the embedding matrix too. The
        matrix is None where it is neither tied nor in the checkpoint.

    Raises:
        OSError: If the checkpoint, or its config, is not there.
        ValueError: If no class generates from such a config.
    """
    generating = generation_class(config)
    if generating is None:
        raise ValueError(f"transformers has no class with an LM head for {type(config).__name__}.")
    stored = type(config).from_pretrained(source, **hub)
    if hasattr(stored, "quantization_config"):
        del stored.quantization_config  # the two matrices are not among what is packed
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = _head_alone(generating).from_pretrained(source, config=stored, output_loading_info=True, **hub)
    finally:
        if bars:
            logging.enable_progress_bar()
    model, found = loaded
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head.weight}
    tied = head.weight is embeddings.weight
    return (None if names & found["missing_keys"] else head.weight.detach()), tied


def _head_alone(generating: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class without what is not needed to load its embeddings and its head. Read in transformers 5.23."""

    def construct(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        generating.__init__(self, config, *args, **kwargs)
        kept = {self.get_input_embeddings(), self.get_output_embeddings()}
        if None in kept:
            raise ValueError(f"{generating.__name__} has no LM head of its own.")
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if module not in kept and not kept & set(child.modules()):
                    delattr(module, name)
        left = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        # Before this the constructor has listed what is tied, the removed parts included.
        self.all_tied_weights_keys = {a: b for a, b in self.all_tied_weights_keys.items() if {a, b} <= left}

    # Key conversions go by the names of class and module.
    members = {
        "__init__": construct,
        "__module__": generating.__module__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    return type(generating.__name__, (generating,), members)


def commit_of(config: PreTrainedConfig) -> str | None:
    """The commit that a config was loaded from on the hub; None for a local folder. Read in transformers 5.23."""
    return getattr(config, "_commit_hash", None)


def media_tokens(transformer: Transformer) -> dict[str, int]:
    """Ids of the placeholder tokens of a backbone, by kind of medium.

    Args:
        transformer: The model's first module.

    Returns:
        `"image"`, `"video"`, `"audio"`, as far as the backbone has them.
    """
    named = {kind: getattr(transformer.config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    return {kind: token for kind, token in named.items() if token is not None}


def ignore_in_forward(*keys: str) -> None:
    """Keep features from the forward of backbones that take any argument, as sentence-transformers does with its own.

    Private name: `_NON_MODEL_FEATURE_KEYS` of `base/modules/transformer.py` (read in 6.1 and 6.2).

    Args:
        *keys: Names of features.
    """
    module: Any = transformer_module
    module._NON_MODEL_FEATURE_KEYS = module._NON_MODEL_FEATURE_KEYS | {*keys}
