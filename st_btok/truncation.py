"""Cutting one input to a limit, exactly: its text is cut at the end, media and bottleneck tokens never.

sentence-transformers cuts text-only inputs by tokens and writes the template's tail back. It does not cut inputs with
media. For those, the checked path and training count the real tokens and cut the text here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# No text has so many characters per token on average: text beyond `limit` times this is dropped before tokenizing.
_CHARS_PER_TOKEN = 16
_SLACK = 4  # tokens: a cut that ends so close below the limit is good enough
_TRIES = 16  # cuts that are tried for one input


class TooLongError(ValueError):
    """An input that exceeds the limit even without text; the message says by how much."""


def truncate_to_limit(
    value: Any, preprocess: Callable[[Any], dict[str, Any]], limit: int, tokenizer: Any
) -> tuple[Any, dict[str, Any]]:
    """An input with media and its features, its text cut so that it keeps the limit, and no more than needed.

    The input is preprocessed whole first. Only if that is too long, its text is cut, to at most 4 tokens below the
    limit. So `model.max_seq_length` holds for every input, whenever it was set. `preprocess` gives the features of one
    normalised input (dict, medium or conversation) without any limit. A `TooLongError` if it is too long even without
    text.
    """
    texts: list[str] = []
    shortened(value, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    text = "".join(texts)[: _CHARS_PER_TOKEN * limit]
    cut = _first_characters(value, len(text))
    features = preprocess(cut)
    length = num_tokens(features)
    if length <= limit:
        return cut, features
    # Search for the number of characters to keep. `most` is known to be too many; `least` few enough (assumed, until
    # `best` is found). The first try comes from the text's own tokens. As a cut can change the tokens around it, every
    # try is preprocessed and counted.
    starts = _token_starts(text, tokenizer)
    least, most = (0, length - len(starts)), (len(text), length)  # (characters, tokens of the input)
    room = limit - least[1]
    kept = starts[room] if 0 < room < len(starts) else 0
    best: tuple[Any, dict[str, Any]] | None = None
    for number in range(_TRIES):
        cut = _first_characters(value, kept)
        features = preprocess(cut)
        length = num_tokens(features)
        if length <= limit:
            best, least = (cut, features), (kept, length)
            if limit - length <= _SLACK or kept + 1 >= most[0]:
                break
        elif kept:
            most = (kept, length)
        else:
            raise TooLongError(
                "an input's media must leave room within the limit, beside its instruction and turns: without its "
                f"text this one still takes {length} tokens, max_seq_length is {limit}. Give it fewer media, lower "
                "max_pixels, or raise model.max_seq_length"
            )
        share = (limit - least[1]) / max(most[1] - least[1], 1)
        kept = min(max(least[0] + int(share * (most[0] - least[0])), least[0] + bool(best)), most[0] - 1)
        if best is None and number >= _TRIES // 2:  # the interpolation misleads
            kept = most[0] // 2
    return best or truncate_to_limit(_first_characters(value, 0), preprocess, limit, tokenizer)


def _first_characters(value: Any, count: int) -> Any:
    """An input that keeps so many characters of all its text, from the start."""
    left = count

    def cut(text: str) -> str:
        nonlocal left
        part = text[:left]
        left -= len(part)
        return part

    return shortened(value, cut)


def shortened(value: Any, cut: Callable[[str], str]) -> Any:
    """A copy of an input (dict, medium, conversation) with each text cut, in order; instructions stay whole."""
    if isinstance(value, list):
        return [
            turn if turn["role"] == "system" else {**turn, "content": _cut(turn["content"], cut)} for turn in value
        ]
    if not isinstance(value, dict) or "text" not in value:
        return value
    return {**value, "text": _cut(value["text"], cut)}


def _cut(content: Any, cut: Callable[[str], str]) -> Any:
    """A text, or a list of texts or of a turn's parts."""
    if isinstance(content, list):
        return [_cut(part, cut) for part in content]
    if isinstance(content, dict):
        return {**content, "text": cut(content["text"])} if content["type"] == "text" else content
    return cut(content)


def _token_starts(text: str, tokenizer: Any) -> list[int]:
    """The character at which each token of a text starts."""
    # Names of control tokens are words in an input, which the chat template sees to.
    words = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
    if tokenizer.is_fast:
        return [start for start, _ in tokenizer(text, return_offsets_mapping=True, **words)["offset_mapping"]]
    count = len(tokenizer(text, **words)["input_ids"])
    return [index * len(text) // count for index in range(count)]


def num_tokens(features: dict[str, Any]) -> int:
    """True length of one row; 1 where it has no tokens, such as the image of a dual encoder."""
    mask, ids = features.get("attention_mask"), features.get("input_ids")
    if isinstance(mask, Tensor):
        return max(1, int(mask.sum()))
    return ids.numel() if isinstance(ids, Tensor) else 1
