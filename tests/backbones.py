"""Tiny random backbones of real transformers classes with real processors, made in code.

Weights are drawn wide (0.2), so that states depend strongly on their inputs: with the usual 0.02 every comparison
would pass on near-constant outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>").split()
# The shape of Qwen's own templates: a default system turn, typed content, a header line per turn.
QWEN_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
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
VISION = {"depth": 2, "num_heads": 2, "initializer_range": 0.2}


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes and Qwen's special tokens: 263 entries, so that 288 embedding rows leave spare ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:2] + SPECIAL[3:],
        model_max_length=2048,
        chat_template=chat_template,
    )


def _ids(own: PreTrainedTokenizerFast) -> dict[str, int]:
    return dict(zip(SPECIAL, own.convert_tokens_to_ids(SPECIAL), strict=True))


def _vl_ids(own: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = _ids(own)
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def qwen2_vl(tied: bool = True, **text: object) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    own = tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "tie_word_embeddings": tied, **text},
        vision_config={**VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        tie_word_embeddings=tied,
        **_vl_ids(own),
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size), own, Qwen2VLVideoProcessor(size=size), chat_template=QWEN_TEMPLATE
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen3_vl(tied: bool = True) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    own = tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={
            **VISION,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 14,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=tied,
        **_vl_ids(own),
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, patch_size=14),
        own,
        Qwen3VLVideoProcessor(size=size, patch_size=14),
        chat_template=QWEN_TEMPLATE,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def llama(
    tied: bool = True, chat_template: str | None = LLAMA_TEMPLATE
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    own = tokenizer(chat_template)
    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tied)), own


BUILDERS = {"qwen2_vl": qwen2_vl, "qwen3_vl": qwen3_vl, "llama": llama}


def build(name: str, **options: object) -> tuple[torch.nn.Module, object]:
    """Model in eval mode and processor of one family, the same weights at every call."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name](**options)
    return model.eval(), processor


def picture(width: int = 56, height: int = 28, seed: int = 0) -> Image.Image:
    """A picture of coloured noise in 14 px blocks."""
    blocks = np.random.default_rng(seed).integers(0, 255, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(14, 0).repeat(14, 1))


def clip(frames: int = 4, seed: int = 0) -> np.ndarray:
    """A video as an array (frames, 56, 56, 3) uint8."""
    return np.stack([np.asarray(picture(56, 56, seed + i)) for i in range(frames)])


def inputs(name: str) -> list:
    """Inputs of every modality that a family takes, of different lengths; the last one is a chat conversation."""
    texts = ["a", "What is the city?", "red kitten " * 5]
    if name == "llama":
        return [*texts, [{"role": "user", "content": "chat"}]]
    return [
        *texts,
        picture(56, 28, 1),
        {"image": picture(28, 84, 2), "text": "what colour?"},
        {"text": "text first", "image": [picture(28, 28, 3), picture(56, 56, 4)]},
        {"video": clip(), "text": "what happens?"},
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "chat"}, {"type": "image", "image": picture(28, 28, 5)}],
            }
        ],
    ]
