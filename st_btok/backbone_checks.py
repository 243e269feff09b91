"""What a backbone must be before it gets bottleneck tokens; each check says the rule, what was seen and what to do."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sentence_transformers.base.modules.transformer import Transformer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from st_btok.model_parts import GENERATING, attention_of, hub_arguments

logger = logging.getLogger(__name__)

PREFIX_ATTENTION = ("paligemma",)  # others are found by `check_causal`, once their weights are read
MIXES_PICTURES = ("phi4_multimodal",)  # measured by `st-btok check`


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse, before any weight is read, what can't be a decoder-only language model."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"the backbone must be decoder-only, but {name} ({config.model_type}) is an encoder-decoder model. "
            "Use a causal language model such as Qwen/Qwen2-VL-2B-Instruct."
        )
    if not any(type(config) in mapping for mapping in GENERATING):
        raise ValueError(
            f"the backbone must be a language model that transformers knows as one, but {name} ({config.model_type}) "
            "is in none of its mappings for causal, image-text-to-text and multimodal language models: an encoder? If "
            "it is a causal decoder of your own, name it first: "
            f"AutoModelForCausalLM.register({type(config).__name__}, YourModelForCausalLM)."
        )
    if config.model_type in PREFIX_ATTENTION:
        raise ValueError(
            f"the backbone must be causal, but {name} ({config.model_type}) reads its input in both directions. Use a "
            "causal language model such as Qwen/Qwen2-VL-2B-Instruct."
        )
    if getattr(config, "is_decoder", True) is False:
        raise ValueError(
            f"the backbone must be a decoder-only language model, but {name} ({config.model_type}) is an encoder. "
            "Bottleneck tokens read their input through causal attention; use a causal language model."
        )


def check_weights(model: PreTrainedModel, path: str, model_kwargs: dict[str, Any]) -> None:
    """Refuse a checkpoint that leaves weights out: transformers draws them at random and only logs it.

    Seen with Qwen2-VL weights under the names of transformers' newer class layout (`model.visual.*`), which
    `AutoModel` does not map (5.23). Loaded once more without reading any weight.
    """
    if {"gguf_file", "quantization_config"} & model_kwargs.keys():
        return  # these make weights while they load, which needs the weights
    loaded: Any = type(model).from_pretrained(
        path,
        config=model.config,
        device_map="meta",
        output_loading_info=True,
        local_files_only=True,
        **hub_arguments(model_kwargs),
    )
    missing, unknown = (sorted(loaded[1][kind]) for kind in ("missing_keys", "unexpected_keys"))
    if missing:
        raise ValueError(
            f"a checkpoint must hold all weights of {type(model).__name__}, but {len(missing)} are missing in {path} "
            f"({', '.join(missing[:2])}, ...), so they would be random; it has {len(unknown)} that go nowhere "
            f"({', '.join(unknown[:2])}, ...). Under other names? Load it with its full class, copy its state_dict() "
            "into a new model of that class made from the config, and pass that: build_model(model, processor=...)."
        )


def check_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Batches are padded; which token does it is for the user to say, who may have trained with one."""
    if tokenizer.pad_token is None:
        token = tokenizer.eos_token or "<|endoftext|>"
        raise ValueError(
            "the tokenizer needs a pad_token, and this one has none. Name a token of its vocabulary: "
            f'build_model(..., processor_kwargs={{"pad_token": "{token}"}}).'
        )


def switch_of_positions(config: PreTrainedConfig) -> int | None:
    """The length in tokens above which LongRoPE reads positions in another way; None for other backbones.

    transformers (5.23) decides by the longest row of a batch, so one long row changes the vectors of all others.
    """
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(part for part in given.values() if isinstance(part, dict))):
        if rope.get("rope_type") == "longrope":
            own = rope.get("original_max_position_embeddings")
            return own or getattr(config, "original_max_position_embeddings", None)
    return None


def warn_of_neighbours(config: PreTrainedConfig, max_seq_length: int | None = None) -> None:
    """Say where an upstream fault makes a vector depend on its batch, which nothing here can mend."""
    switch = switch_of_positions(config.get_text_config(decoder=True))
    if switch:
        logger.warning(
            "LongRoPE reads all rows of a batch in another way once one of them is longer than %d tokens. %s", switch,
            f"max_seq_length={max_seq_length} lets such rows in: encode one row at a time."
            if (max_seq_length or 0) > switch else "So max_seq_length is at most that, unless a larger one is passed.",
        )  # fmt: skip
    if config.model_type in MIXES_PICTURES and attention_of(config) != "eager":
        logger.warning(
            "In transformers 5.23 pictures of different shapes in one batch change each other's vectors on %s under "
            "%s attention. Build and load this model with model_kwargs={'attn_implementation': 'eager'}, or encode "
            "pictures one at a time.",
            config.model_type, attention_of(config),
        )  # fmt: skip


@torch.no_grad()
def check_causal(transformer: Transformer) -> None:
    """States may not depend on later tokens: the condensation loss and the readout both rest on it."""
    features = transformer.preprocess([{"text": "one two three"}])
    model = transformer.model.eval()
    kwargs = {key: features[key].to(model.device) for key in ("input_ids", "attention_mask")}
    before = model(**kwargs, return_dict=True).last_hidden_state[:, :-1]
    kwargs["input_ids"] = kwargs["input_ids"].clone()
    kwargs["input_ids"][:, -1] = kwargs["input_ids"][:, 0]
    after = model(**kwargs, return_dict=True).last_hidden_state[:, :-1]
    change = (after - before).abs().max().item()
    if not change <= 1e-3 * before.abs().max().item():
        raise ValueError(
            f"the backbone must be causal, but changing the last token of an input changed earlier states by "
            f"{change:.2g} ({transformer.config.model_type}). Bidirectional and prefix attention are not supported."
        )
