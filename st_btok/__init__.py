"""Bottleneck-token embeddings for any decoder-only (multimodal) language model, on sentence-transformers.

Axis letters, fixed for the whole package: B batch, T tokens, K bottleneck tokens, D width, V vocabulary, N target
tokens of a row, M target tokens of a batch.
"""

from st_btok.adapters import btok_lora_config, merge_adapters, save_trained
from st_btok.budgets import read_budget
from st_btok.chat_template import append_btoks, plain_template
from st_btok.inputs.encoding import CheckedEmbeddings, CheckedInputs, SkippedInput, checked_inputs, encode_checked
from st_btok.inputs.pdf import pdf_pages
from st_btok.model import build_model
from st_btok.pooling import BTokPooling
from st_btok.tokens import add_btoks, btok_ids, btok_tokens
from st_btok.tools.explain import btok_attention, decode_btoks
from st_btok.training.attention import condensation_attention, condensation_mask, register_condensation_attention
from st_btok.training.cached_losses import CachedBTokLoss
from st_btok.training.likelihood import condensation_nll
from st_btok.training.lm_head import TrainedHead, save_lm_head
from st_btok.training.losses import BTokLoss
from st_btok.version import __version__

__all__ = [
    "__version__",
    "BTokLoss",
    "BTokPooling",
    "CachedBTokLoss",
    "CheckedEmbeddings",
    "CheckedInputs",
    "SkippedInput",
    "TrainedHead",
    "add_btoks",
    "append_btoks",
    "btok_attention",
    "btok_ids",
    "btok_lora_config",
    "btok_tokens",
    "build_model",
    "checked_inputs",
    "condensation_attention",
    "condensation_mask",
    "condensation_nll",
    "decode_btoks",
    "encode_checked",
    "merge_adapters",
    "pdf_pages",
    "plain_template",
    "read_budget",
    "register_condensation_attention",
    "save_lm_head",
    "save_trained",
]
