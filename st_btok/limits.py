"""How much text fits into one input: the numbers that the chat template of `chat_template.py` cuts by.

A template sees characters and media items, not tokens, so a token limit is turned into characters once, when the
model is built, by running the backbone's own processor: characters per token on English prose, tokens of one image of
the largest allowed size, tokens of an 8-frame video of that size, tokens of 30 seconds of sound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers.base.modules.transformer import Transformer

_PROSE = (
    "A text is shortened at its end when an input grows too long. The limit counts characters, because a chat "
    "template can see characters, and it is set so that ordinary prose comes close to the asked number of tokens."
)
_SAMPLING_RATE = 16_000  # Hz; what Whisper-type feature extractors take
_LARGE = 4096  # px; every processor shrinks this to its own largest size


def text_limits(transformer: Transformer, max_seq_length: int) -> dict[str, int]:
    """Limits in characters for inputs of at most about `max_seq_length` tokens.

    Args:
        transformer: The module whose processor, template and pixel limits are measured. Its template must already
            append the BToks.
        max_seq_length: Tokens of a whole input, template and BToks included.

    Returns:
        For `processing_kwargs["chat_template"]`: `max_chars`, the text of an input without media; `image_chars`,
        `video_chars`, `audio_chars`: what one image, video or sound takes from it (a template can't see how many
        frames or seconds there are; 8 frames and 30 seconds are counted). Exact for a tokenizer with one token per
        character, close for English text otherwise.

    Raises:
        ValueError: If `max_seq_length` leaves no room for a single token of text.
    """
    # Measured around a text of one token: some layouts add something, such as a newline, only where there is text.
    empty = _num_tokens(transformer, {"text": "a"}) - 1
    room = max_seq_length - empty
    if room < 1:
        raise ValueError(
            f"max_seq_length must leave room for text: the template and the bottleneck tokens alone take {empty} "
            f"tokens, max_seq_length is {max_seq_length}. Raise it above {empty}."
        )
    chars_per_token = max(1, len(_PROSE) // (_num_tokens(transformer, {"text": _PROSE}) - empty))
    limits = {"max_chars": room * chars_per_token, "image_chars": 0, "video_chars": 0, "audio_chars": 0}
    if "image" in transformer.modality_config:
        image = Image.new("RGB", (_LARGE, _LARGE))
        limits["image_chars"] = (_num_tokens(transformer, {"image": image, "text": "a"}) - 1 - empty) * chars_per_token
    if "video" in transformer.modality_config:
        frames = np.zeros((8, _LARGE // 4, _LARGE // 4, 3), np.uint8)
        tokens = _num_tokens(transformer, {"video": frames, "text": "a"}) - 1 - empty
        limits["video_chars"] = tokens * chars_per_token
    if "audio" in transformer.modality_config:
        sound = {"array": np.zeros(30 * _SAMPLING_RATE, np.float32), "sampling_rate": _SAMPLING_RATE}
        tokens = _num_tokens(transformer, {"audio": sound, "text": "a"}) - 1 - empty
        limits["audio_chars"] = tokens * chars_per_token
    return limits


def _num_tokens(transformer: Transformer, sample: Any) -> int:
    """Length of one input in tokens, without any limit."""
    unlimited: Any = {"text": {"truncation": False}, "chat_template": {"max_chars": None}}
    return int(transformer.preprocess([sample], processing_kwargs=unlimited)["attention_mask"].sum())
