"""The fair baseline of bottleneck tokens: stock poolings behind the same prompt, as plain text, in the same turn.

PromptEOL reads the last token behind a prompt that every input ends in. Bottleneck tokens that start as the rows of
that prompt are compared with it here: the prompt is written by the chat template, so that sentence-transformers, which
writes a template's tail back over the end of a text that it cuts, never cuts it.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import ModalityParams, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from st_btok import freeze_batch_norm, plain_template


def prompted_model(
    backbone: str,
    pooling: str = "lasttoken",
    prompt: str = "",
    opened: bool = False,
    device: str | None = None,
    max_seq_length: int | None = None,
    **kwargs: Any,
) -> SentenceTransformer:
    """The backbone under a pooling of sentence-transformers' own, behind a prompt.

    Args:
        backbone: Hub name or path.
        pooling: `lasttoken`, or `mean`: over all tokens, with a prompt over the prompt's own.
        prompt: Text behind every input's last turn, such as `" The topic is the"`.
        opened: Whether the assistant's turn is opened behind the input, and the prompt stands in it.
        device: Where it is put; None: where sentence-transformers puts it.
        max_seq_length: Longest input in tokens, template and prompt included.
        **kwargs: For sentence-transformers' `Transformer`.

    Returns:
        The model.

    Raises:
        ValueError: If a turn is to be opened by a backbone without a chat template.
    """
    transformer = Transformer(backbone, max_seq_length=max_seq_length, **kwargs)
    num_tokens = append_prompt(transformer, prompt, opened) if prompt or opened else 0
    width = transformer.get_embedding_dimension()
    pooled = LastTokensMean(num_tokens) if pooling == "mean" and num_tokens else Pooling(width, pooling)
    model = SentenceTransformer(modules=[transformer, pooled, Normalize()], device=device)
    freeze_batch_norm(model)  # as `build_model` does
    return model


def append_prompt(transformer: Transformer, prompt: str, opened: bool) -> int:
    """Let the chat template end every input in a prompt; returns the number of the prompt's tokens.

    Changes `transformer` in place. With `opened` the template opens the assistant's turn before the prompt.

    Raises:
        ValueError: If there is no chat template that could open a turn.
    """
    processor = transformer.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    own = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if own is None:
        if opened:
            raise ValueError("opened=true needs a backbone with a chat template, and this one has none.")
        own = plain_template()
        message = ModalityParams(method="forward", method_output_name="last_hidden_state")
        message["format"] = transformer.input_formatter.message_format = "structured"
        transformer.modality_config["message"] = message
        transformer.input_formatter.supported_modalities = list(transformer.modality_config)
    turn = f"{{%- set add_generation_prompt = {str(opened).lower()} -%}}"
    tail = f"{{{{- {ascii(prompt)} -}}}}" if prompt else ""
    processor.chat_template = tokenizer.chat_template = f"{turn}{own}{tail}"
    return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


class LastTokensMean(Module):
    """The mean over an input's last tokens.

    Args:
        num_tokens: How many, at least 1.
    """

    config_keys = ["num_tokens"]

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pool `token_embeddings` (B, T, D), with `attention_mask` (B, T), to `sentence_embedding` (B, D)."""
        mask = features["attention_mask"].long()
        from_end = mask.flip(1).cumsum(1).flip(1)  # (B, T), 1 at the last real token
        kept = (mask.bool() & (from_end <= self.num_tokens)).to(features["token_embeddings"].dtype)
        features["sentence_embedding"] = torch.einsum("bt,btd->bd", kept, features["token_embeddings"])
        features["sentence_embedding"] = features["sentence_embedding"] / kept.sum(1, keepdim=True)
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the config."""
        self.save_config(output_path)
