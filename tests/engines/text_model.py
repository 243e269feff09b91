"""A text-only BTok model for engines that take no media: a small Llama with random weights and a GPT-2 tokenizer."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from st_btok import build_model
from tests.engines.table import ROOT
from tests.tiny_tokenizer import LLAMA_TEMPLATE, SPECIAL

LIMIT = 1024
# Wide weights: with the usual 0.02 all states would be near each other, and every comparison would pass.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}


def text_model(readout: str) -> SentenceTransformer:
    """Build it in float32 on the CPU, the same at every call."""
    tokenizer = gpt2_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer) + 4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LIMIT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return build_model(LlamaForCausalLM(config), processor=tokenizer, readout=readout, device="cpu")


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learnt from the project's own page, split as GPT-2 splits, so that engines know the kind."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL[:3])
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=LIMIT,
        chat_template=LLAMA_TEMPLATE,
    )
