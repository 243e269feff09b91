"""An input with media within the limit, to the token: its text gives way at the end, media and BToks never.

sentence-transformers cuts text-only inputs by tokens and writes the template's tail back; inputs with media it leaves
to the chat template, which sees no tokens and bounds them by bytes (see `limits.py`). Here the tokens are counted: the
input is preprocessed whole, and only if that is too long, as many tokens of text as it has too many are dropped and it
is preprocessed again. So `model.max_seq_length`, whenever it was set, holds for every input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from st_btok.inputs.collate import num_tokens

# No text has that many characters a token on average; what lies beyond is dropped before the tokenizer reads it.
_CHARS_PER_TOKEN = 16
_NO_LIMIT = 2**31 - 1
_SLACK = 4  # tokens below the limit that are not worth another try
_TRIES = 16


class TooLongError(ValueError):
    """An input that exceeds the limit even without text; the message says by how much."""


@dataclass(frozen=True)
class Fitted:
    """An input that keeps the limit.

    Attributes:
        value: The input, its text as long as it may be.
        features: What the model reads.
    """

    value: Any
    features: dict[str, Any]


def fit(
    value: Any, preprocess: Callable[[Any], dict[str, Any]], limit: int, tokenizer: PreTrainedTokenizerBase
) -> Fitted:
    """Shorten the text of an input until it keeps the limit, and no more than that.

    Args:
        value: A normalised input: dict, medium or conversation.
        preprocess: Gives the features of one input, without any limit.
        limit: Tokens of a whole input.
        tokenizer: The model's tokenizer.

    Returns:
        The input and its features, at most `_SLACK` tokens below the limit if text was cut.

    Raises:
        TooLongError: If it is too long even without text.
    """
    text = "".join(_texts(value))[: _CHARS_PER_TOKEN * limit]
    features = preprocess(shortened(value, len(text)))
    length = num_tokens(features)
    if length <= limit:
        return Fitted(shortened(value, len(text)), features)
    starts = _starts(text, tokenizer)
    # So many characters are too many, so many few enough; the second is a guess until `found`.
    high, low = (len(text), length), (0, length - len(starts))
    # Where the text's tokens start tells where to cut. Only a byte fallback gives many of them one start.
    chars = starts[limit - low[1]] if 0 < limit - low[1] < len(starts) else 0
    found = None
    for number in range(_TRIES):
        fitted = shortened(value, chars)
        features = preprocess(fitted)
        length = num_tokens(features)
        if length <= limit:
            found, low = Fitted(fitted, features), (chars, length)
            if limit - length <= _SLACK or chars + 1 >= high[0]:
                break
        elif chars:
            high = (chars, length)
        else:
            raise TooLongError(
                "an input's media must leave room within the limit, beside its instruction and turns: without its "
                f"text this one still takes {length} tokens, max_seq_length is {limit}. Give it fewer media, lower "
                "max_pixels, or raise model.max_seq_length"
            )
        share = (limit - low[1]) / max(high[1] - low[1], 1)
        chars = min(max(low[0] + int(share * (high[0] - low[0])), low[0] + bool(found)), high[0] - 1)
        if found is None and number >= _TRIES // 2:  # the guess misleads: halve instead
            chars = high[0] // 2
    return found or fit(shortened(value, 0), preprocess, limit, tokenizer)


def shortened(value: Any, chars: int) -> Any:
    """An input that keeps so many characters of text, from the start; instructions (system turns) stay whole.

    Args:
        value: A normalised input: dict, medium or conversation.
        chars: Characters of all its text.

    Returns:
        A copy; media are the same objects.
    """
    left = chars

    def cut(text: str) -> str:
        nonlocal left
        part = text[:left]
        left -= len(part)
        return part

    if isinstance(value, list):
        return [_shortened_turn(turn, cut) for turn in value]
    if not isinstance(value, dict) or "text" not in value:
        return value
    text = value["text"]
    return {**value, "text": [cut(part) for part in text] if isinstance(text, list) else cut(text)}


def _shortened_turn(turn: dict[str, Any], cut: Callable[[str], str]) -> dict[str, Any]:
    if turn["role"] == "system":
        return turn
    if isinstance(turn["content"], str):
        return {**turn, "content": cut(turn["content"])}
    content = [{**part, "text": cut(part["text"])} if part["type"] == "text" else part for part in turn["content"]]
    return {**turn, "content": content}


def _texts(value: Any) -> list[str]:
    """All text that may be cut, in order: what `shortened` passes to `cut`."""
    if isinstance(value, list):
        turns = [turn["content"] for turn in value if turn["role"] != "system"]
        parts = [content if isinstance(content, list) else [{"type": "text", "text": content}] for content in turns]
        return [part["text"] for content in parts for part in content if part["type"] == "text"]
    text = value.get("text", "") if isinstance(value, dict) else ""
    return text if isinstance(text, list) else [text]


def _starts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The character at which each token of a text starts."""
    # Names of control tokens are words in an input, which the chat template sees to.
    words = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
    if tokenizer.is_fast:
        return [start for start, _ in tokenizer(text, return_offsets_mapping=True, **words)["offset_mapping"]]
    count = len(tokenizer(text, **words)["input_ids"])
    return [index * len(text) // count for index in range(count)]


def limit_of(model: SentenceTransformer, processing_kwargs: dict[str, Any] | None) -> int | None:
    """Tokens of a whole input.

    Args:
        model: A BTok model.
        processing_kwargs: See `encode`.

    Returns:
        `max_length` of the text as asked for, else `model.max_seq_length`; None where truncation is off.
    """
    text = (processing_kwargs or {}).get("text", {})
    if text.get("truncation", True) is False:
        return None
    return text.get("max_length") or model.max_seq_length


def without_limits(processing_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call that renders and tokenizes an input as long as it is.

    Args:
        processing_kwargs: See `encode`.

    Returns:
        `processing_kwargs` for `preprocess`.
    """
    own = processing_kwargs or {}
    text, template = own.get("text", {}), own.get("chat_template", {})
    # `max_chars` of the caller's own stays; the saved one goes.
    template = {"max_chars": None, **template, "max_tokens": None}
    # Not truncation=False: transformers would warn of inputs that are too long, which is what is counted here.
    return {**own, "text": {**text, "truncation": True, "max_length": _NO_LIMIT}, "chat_template": template}


def with_raised_limit(
    model: SentenceTransformer, processing_kwargs: dict[str, Any] | None, limit: int
) -> dict[str, Any] | None:
    """The arguments of a call for texts, where the limit was raised after the model was built.

    The saved template drops what lies far beyond the limit that it was built with.

    Args:
        model: A BTok model.
        processing_kwargs: See `encode`.
        limit: Tokens of a whole input.

    Returns:
        `processing_kwargs` for `preprocess`.
    """
    saved: Any = getattr(model[0], "processing_kwargs", {}).get("chat_template", {})
    own = processing_kwargs or {}
    asked = own.get("chat_template", {})
    if "max_chars" in asked or not saved.get("max_chars") or limit <= saved.get("max_tokens", limit):
        return processing_kwargs
    chars = math.ceil(saved["max_chars"] / saved["max_tokens"] * limit)
    return {**own, "chat_template": {**asked, "max_chars": chars}}
