"""Text that an engine tokenises without the chat template still gets the template's turn and the BToks around it.

A bare `"input"` of a request is tokenised as plain text, with the special tokens that `tokenizer.json` adds to every
text (its post-processor). A rendered chat is tokenised without them, by transformers' `apply_chat_template`, by
sentence-transformers and by engines. So what stands in the post-processor reaches bare text alone: here the tokens
that the template puts around a user's text, and a bare text then has the ids of the right prompt, cut to the limit
before they are added.

For text-only backbones. A processor of a model with media tokenises a rendered chat with the special tokens
(`ProcessorMixin.apply_chat_template`, unless the chat begins with a bos token), and its BToks would be there twice.
"""

from __future__ import annotations

import json
from typing import Any

from sentence_transformers.base.modules.transformer import Transformer
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from st_btok.model_parts import tokenizer_of

# The first tokens of a text can depend on what stands before it, so words, digits, other scripts and signs are tried.
_PROBES = ("Which town lies by the sea?", "42 kites", "東京の夜", "- two\n  lines", "x")


def frame_bare_text(transformer: Transformer) -> bool:
    """Let the tokenizer of a text-only model put the template's user turn and the BToks around every bare text.

    False if nothing was changed: the model takes media, its tokenizer is not one of the `tokenizers` library, or text
    does not keep its tokens between those of the template.
    """
    tokenizer: Any = tokenizer_of(transformer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if transformer.processor is not tokenizer or not isinstance(backend, Tokenizer):
        return False
    frame = _frame(tokenizer, structured=transformer.modality_config["message"]["format"] == "structured")
    if frame is None:
        return False
    named = [(name, ids) for name, ids in zip(("<head>", "<tail>"), frame, strict=True) if ids]
    parts = [{"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in named]
    single = ["<head>:0", "$A:0", "<tail>:0"] if frame[0] else ["$A:0", "<tail>:0"]
    pair = [*single[:-1], "$B:0", "<tail>:0"]
    framing = processors.TemplateProcessing(single=single, pair=pair, special_tokens=parts)
    backend.post_processor = processors.Sequence([*_byte_level(backend), framing])
    return True


def _frame(tokenizer: PreTrainedTokenizerBase, structured: bool) -> tuple[list[int], list[int]] | None:
    """Ids before and after a user's text; None if they depend on the text, or the text's own tokens on them."""
    found = set()
    for probe in _PROBES:
        content = [{"type": "text", "text": probe}] if structured else probe
        chat: Any = [{"role": "user", "content": content}]
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
        head, text, tail = rendered.partition(probe)
        before, own, after, whole = (
            tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (head, text, tail, rendered)
        )
        if [*before, *own, *after] != whole:
            return None
        found.add((tuple(before), tuple(after)))
    return None if len(found) != 1 else (list(before), list(after))


def _byte_level(backend: Tokenizer) -> list[Any]:
    """The parts of the present post-processor that add no tokens: they correct the tokens' places in the text."""
    present = json.loads(backend.to_str())["post_processor"] or {}
    parts = present.get("processors", [present])
    return [
        processors.ByteLevel(trim_offsets=part["trim_offsets"]) for part in parts if part.get("type") == "ByteLevel"
    ]
