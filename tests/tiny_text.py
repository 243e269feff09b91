"""Tiny text-only backbones: full and sliding attention, soft-capped logits, and no attention at all."""

from __future__ import annotations

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny_tokenizer import LLAMA_TEMPLATE, TEXT, tokenizer

Built = tuple[PreTrainedModel, PreTrainedTokenizerFast]


def llama(tied: bool = True, chat_template: str | None = LLAMA_TEMPLATE) -> Built:
    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tied)), tokenizer(chat_template)


def qwen3(tied: bool = True) -> Built:
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8, tie_word_embeddings=tied)), tokenizer(LLAMA_TEMPLATE)


def gemma(tied: bool = True) -> Built:
    config = GemmaConfig(**TEXT, head_dim=8, pad_token_id=256, tie_word_embeddings=tied)
    return GemmaForCausalLM(config), tokenizer(LLAMA_TEMPLATE)


def gemma2(tied: bool = True) -> Built:
    """Soft-capped attention scores, which transformers' SDPA can't compute."""
    options = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "pad_token_id": 256}
    config = Gemma2Config(**TEXT, **options, tie_word_embeddings=tied)
    return Gemma2ForCausalLM(config), tokenizer(LLAMA_TEMPLATE)


def mistral(tied: bool = True) -> Built:
    """A sliding window of 12 tokens: every input and every target of the tests is longer."""
    config = MistralConfig(**TEXT, sliding_window=12, tie_word_embeddings=tied)
    return MistralForCausalLM(config), tokenizer(LLAMA_TEMPLATE)


def mamba(tied: bool = True) -> Built:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2}
    config = MambaConfig(vocab_size=288, **sizes, bos_token_id=None, eos_token_id=258, tie_word_embeddings=tied)
    return MambaForCausalLM(config), tokenizer(LLAMA_TEMPLATE)
