"""A byte-level tokenizer made in code, and the chat templates and text sizes of the tiny backbones."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>").split()
# The shape of Qwen's own templates: a default system turn, typed content, a header line per turn.
_TYPED = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "MEDIA{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LLAMA_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{{- message['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
)
TEXT = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 258,
}


def typed_template(**placeholders: str) -> str:
    """A template for typed content that writes each medium as the given placeholder."""
    parts = "".join(
        f"{{%- if part.type == '{kind}' -%}}{{{{- '{placeholder}' -}}}}{{%- endif -%}}"
        for kind, placeholder in placeholders.items()
    )
    return _TYPED.replace("MEDIA", parts)


QWEN_TEMPLATE = typed_template(
    image="<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>"
)


def tokenizer(chat_template: str | None = None, **media: str) -> PreTrainedTokenizerFast:
    """Bytes and special tokens; by default Qwen's: 263 entries, so that 288 embedding rows leave spare ones.

    Further tokens are given by the attribute that a processor reads them from, such as `image_token="<image>"`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([*SPECIAL, *media.values()]))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:2] + special[3:],
        model_max_length=2048,
        chat_template=chat_template,
        **media,
    )
