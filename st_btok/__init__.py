"""Bottleneck-token embeddings for any decoder-only (multimodal) language model, on sentence-transformers.

Axis letters, fixed for the whole package: B batch, T tokens, K bottleneck tokens, D width, V vocabulary, N target
tokens of a row, M target tokens of a batch.

Importing this package loads nothing heavy: a public name brings its module along when it is first asked for (PEP 562),
so that `st-btok --help` answers at once and reading a PDF needs no LoRA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from st_btok.version import __version__

if TYPE_CHECKING:  # what type checkers, editors and the documentation read
    from st_btok.adapters import btok_lora_config, language_model_linears, merge_adapters, save_trained
    from st_btok.batch_norm import freeze_batch_norm
    from st_btok.budgets import read_budget
    from st_btok.chat_template import append_btoks, plain_template
    from st_btok.inputs.encode import (
        CheckedEmbeddings,
        CheckedInputs,
        EncodedRow,
        SkippedInput,
        checked_inputs,
        encode_checked,
        encode_rows,
    )
    from st_btok.inputs.fetch import MediaOptions
    from st_btok.inputs.images import open_image, rgb_image
    from st_btok.inputs.pdf import pdf_pages
    from st_btok.inputs.videos import read_video
    from st_btok.model import build_model
    from st_btok.pooling import BTokPooling
    from st_btok.tokens import add_btoks, btok_ids, btok_tokens
    from st_btok.tools.explain import BTokAttention, Decoded, btok_attention, decode_btoks
    from st_btok.tools.explain_figure import draw_attention
    from st_btok.training.cached_loss import CachedBTokLoss
    from st_btok.training.callback import BTokCallback
    from st_btok.training.loss import BTokLoss
    from st_btok.training.mask import condensation_attention, condensation_mask, register_condensation_attention

__all__ = [
    "__version__", "BTokAttention", "BTokCallback", "BTokLoss", "BTokPooling", "CachedBTokLoss", "CheckedEmbeddings",
    "CheckedInputs", "Decoded", "EncodedRow", "MediaOptions", "SkippedInput", "add_btoks", "append_btoks",
    "btok_attention", "btok_ids", "btok_lora_config", "btok_tokens", "build_model", "checked_inputs",
    "condensation_attention", "condensation_mask", "decode_btoks", "draw_attention", "encode_checked", "encode_rows",
    "freeze_batch_norm", "language_model_linears", "merge_adapters", "open_image", "pdf_pages", "plain_template",
    "read_budget", "read_video", "register_condensation_attention", "rgb_image", "save_trained",
]  # fmt: skip

# Where each public name lives: what `__getattr__` reads, and the same as above (tested).
_PLACES = {
    name: f"st_btok.{module}"
    for module, names in {
        "adapters": "btok_lora_config language_model_linears merge_adapters save_trained",
        "batch_norm": "freeze_batch_norm",
        "budgets": "read_budget",
        "chat_template": "append_btoks plain_template",
        "inputs.encode": "CheckedEmbeddings CheckedInputs EncodedRow SkippedInput "
        "checked_inputs encode_checked encode_rows",
        "inputs.fetch": "MediaOptions",
        "inputs.images": "open_image rgb_image",
        "inputs.pdf": "pdf_pages",
        "inputs.videos": "read_video",
        "model": "build_model",
        "pooling": "BTokPooling",
        "tokens": "add_btoks btok_ids btok_tokens",
        "tools.explain": "BTokAttention Decoded btok_attention decode_btoks",
        "tools.explain_figure": "draw_attention",
        "training.mask": "condensation_attention condensation_mask register_condensation_attention",
        "training.cached_loss": "CachedBTokLoss",
        "training.callback": "BTokCallback",
        "training.loss": "BTokLoss",
    }.items()
    for name in names.split()
}

if not TYPE_CHECKING:  # a module `__getattr__` that type checkers see would let every misspelt name pass

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_PLACES[name]), name)
        globals()[name] = value  # the next look-up does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
