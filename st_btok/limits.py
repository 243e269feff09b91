"""How long an input may be, in tokens: what is saved beside the chat template so that the stock checkpoint keeps it.

Text alone is cut by sentence-transformers itself, exactly: the tokenizer cuts at `max_seq_length`, then the template's
tail (the turn's closing and the BToks) is written back over the end (`Transformer._restore_chat_template_suffix`, ST
6.2). It leaves alone whatever holds media, or what it can't tell from media. Such inputs must arrive within the limit,
and there the chat template sees to it with an upper bound: see `templates/bound.jinja`. This file measures what that
bound adds up, by running the backbone's own processor. `encode_checked` and training count real tokens
instead: `truncation.py`.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers.base.modules.transformer import Transformer
from transformers import PreTrainedTokenizerBase

from st_btok.model_parts import tokenizer_of
from st_btok.tokens import btok_ids, control_tokens

logger = logging.getLogger(__name__)

# How the error begins that `bound.jinja` raises where media may not fit.
MEDIA_MAY_NOT_FIT = "st_btok: an input's media must leave room within the limit"
# For `processing_kwargs` of one call: what sentence-transformers does not cut is known to fit.
FITTING: Any = {"chat_template": {"max_tokens": None}}
# For `processing_kwargs` of one call: an input as long as it is, for measurements.
UNLIMITED: Any = {"text": {"truncation": False}, "chat_template": {"max_chars": None}}

_PROSE = (
    "Text is cut by tokens, but a tokenizer reads all of it first. So the chat template drops what lies far beyond "
    "the limit, measured in characters, before the tokenizer sees it: a book then costs no more than a few pages."
)
# The template keeps this many times the characters that prose of the limit's length has: enough for scripts, code and
# tables whose tokens are longer than those of English prose, and little enough to save the work.
_SPARE = 1.5
_SAMPLING_RATE = 16_000  # Hz; what Whisper-type feature extractors take
_LARGE = 2400  # px; every processor shrinks this to its own largest size
# Long side over short side of the images that are tried: a processor that cuts tiles fits them into some shape, so a
# square is seldom its longest image.
_RATIOS = (1, 4 / 3, 2, 3)
# Short and long side near the most that Qwen-VL takes, 1 to 200: one row of patches is left, which may be longer than
# the largest area allows.
_THIN = (20, 3980)
_FRAMES = 8
_BESIDE_AN_IMAGE = 256


def set_max_seq_length(transformer: Transformer, max_seq_length: int) -> None:
    """Limit the inputs of a BTok model, media included, in place.

    `model.max_seq_length = n` limits text alone just as well. The chat template can't see that number, so for inputs
    with media it keeps the limit that was set here.

    Args:
        transformer: The model's first module. Its template must already append the BToks.
        max_seq_length: Tokens of a whole input, template and BToks included.

    Raises:
        ValueError: If `max_seq_length` leaves no room for a single token of text.
    """
    kept: Any = dict(transformer.processing_kwargs)
    own: Any = kept.get("chat_template", {})
    measured: Any = {} if "frame_tokens" in own else _media_limits(transformer)
    # Measured around a text of one token: some layouts add something, such as a newline, only where there is text.
    empty = _num_tokens(transformer, {"text": "a"}) - 1
    if max_seq_length <= empty:
        raise ValueError(
            f"max_seq_length must leave room for text: the template and the bottleneck tokens alone take {empty} "
            f"tokens, max_seq_length is {max_seq_length}. Raise it above {empty}."
        )
    chars_per_token = len(_PROSE) / (_num_tokens(transformer, {"text": _PROSE}) - empty)
    max_chars = math.ceil(_SPARE * chars_per_token * max_seq_length)
    limits = {**own, **measured, "max_tokens": max_seq_length, "max_chars": max_chars}
    transformer.processing_kwargs = {**kept, "chat_template": limits}
    transformer.max_seq_length = max_seq_length
    for kind in ("image", "video", "audio"):
        if limits[f"{kind}_tokens"] + limits["frame_tokens"] >= max_seq_length:
            logger.warning(
                "%s input can take up to %d tokens on this backbone, max_seq_length is %d: plain `encode` refuses "
                "every input of that kind, because it can't see sizes. `encode_checked` and training count real "
                "tokens and take what fits.",
                kind.capitalize(), limits[f"{kind}_tokens"], max_seq_length,
            )  # fmt: skip


def tokens_of_an_image(transformer: Transformer, max_seq_length: int) -> int:
    """Tokens that one image may have at most, so that text has room beside it in plain `encode` too.

    Three quarters of what the turns leave, or all but 256 tokens of it if that is more; and little enough that the
    thinnest image, one row of patches, has no more tokens than that. The template must already append the BToks.
    """
    tokenizer = tokenizer_of(transformer)
    template = str(tokenizer.chat_template)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]
    turns = str(transformer.processor.apply_chat_template(turn, chat_template=template, tokenize=False))
    for name in control_tokens(tokenizer, template):
        turns = turns.replace(name, "..")  # as `bound.jinja` counts them
    room = max_seq_length - len(turns.encode()) - _frame_tokens(tokenizer)
    tokens = max(3 * room // 4, room - _BESIDE_AN_IMAGE)
    return min(tokens, tokens * tokens * _THIN[0] // _THIN[1])


def _media_limits(transformer: Transformer) -> dict[str, Any]:
    """What `bound.jinja` adds up: tokens of the largest media, of a row's frame, and characters that grow.

    A template can't see how many seconds a sound has, nor the frames of a video unless it is a list: 30 seconds and 8
    frames are counted.
    """
    tokenizer = tokenizer_of(transformer)
    growing, growth = growing_characters(tokenizer)
    empty = _num_tokens(transformer, {"text": "a"})
    limits: dict[str, Any] = {"frame_tokens": _frame_tokens(tokenizer), "growing": growing, "growth": growth}
    for kind in ("image", "video", "audio"):
        limits[f"{kind}_tokens"] = 0
        if kind in transformer.modality_config:
            area = _largest_area(transformer, kind)
            form = video_form(transformer) if kind == "video" else lambda item: item
            if form is None:
                continue
            large = _large_media(kind, bool(area))
            lengths = [_num_tokens(transformer, {kind: form(item), "text": "a"}) for item in large]
            tokens = max(lengths) - empty
            if kind == "video" and tokens > area:  # the area is that of a frame, not of the whole video
                area *= _FRAMES
            limits[f"{kind}_tokens"] = max(tokens, area)
    return limits


def _frame_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the template does not show; some tokenizers put a blank in front of everything."""
    return len(btok_ids(tokenizer)) + tokenizer.num_special_tokens_to_add() + 1


def _largest_area(transformer: Transformer, kind: str) -> int:
    """Tokens of the largest area, for processors that take any shape up to one (Qwen-VL); otherwise 0.

    No shape tried need reach it: of 1,280 tokens a square takes 1,225.
    """
    processor: Any = getattr(transformer.processor, f"{kind}_processor", None)
    pixels = dict(getattr(processor, "size", None) or {}).get("longest_edge")
    if not pixels or not hasattr(processor, "merge_size"):
        return 0
    return pixels // (processor.patch_size * processor.merge_size) ** 2


def _large_media(kind: str, any_shape: bool) -> Iterator[Any]:
    """Media of the largest size in the shapes that are tried."""
    if kind == "audio":
        yield {"array": np.zeros(30 * _SAMPLING_RATE, np.float32), "sampling_rate": _SAMPLING_RATE}
    elif kind == "video":
        yield np.zeros((_FRAMES, _LARGE // 3, _LARGE // 3, 3), np.uint8)
        if any_shape:
            yield np.zeros((_FRAMES, *_THIN, 3), np.uint8)
    elif any_shape:
        yield Image.new("RGB", (_LARGE, _LARGE))
        yield Image.new("RGB", _THIN)
    else:
        for ratio in _RATIOS:
            yield Image.new("RGB", (round(_LARGE / ratio), _LARGE))
            yield Image.new("RGB", (_LARGE, round(_LARGE / ratio)))


def video_form(transformer: Transformer) -> Callable[[np.ndarray], Any] | None:
    """The form in which a backbone's processor takes frames (F, H, W, 3) uint8 that were made here.

    The frames, or with their times, or more of them: some processors refuse bare frames, because they choose frames by
    time (GLM-4V, MiniCPM-V), or fewer frames than they choose (Gemma 4). None, with a warning, where none of these is
    taken.
    """
    wanted = getattr(getattr(transformer.processor, "video_processor", None), "num_frames", None) or 0

    def bare(frames: np.ndarray) -> Any:
        return frames

    def timed(frames: np.ndarray) -> Any:
        count = len(frames)
        times = {"fps": 2.0, "duration": count / 2, "total_num_frames": count, "frames_indices": list(range(count))}
        return {"array": frames, "video_metadata": times}

    def repeated(frames: np.ndarray) -> Any:
        return timed(np.concatenate([frames] * math.ceil(wanted / len(frames))))

    forms = (bare, timed, repeated) if wanted else (bare, timed)
    for form in forms:
        try:
            _num_tokens(transformer, {"video": form(np.zeros((2, 56, 56, 3), np.uint8)), "text": "a"})
        except Exception as error:  # processors raise what they like
            reason = str(error) or type(error).__name__
            continue
        return form
    logger.warning(
        "The backbone's %s takes no video, bare or with its times (%s): inputs with one will be errors.",
        type(transformer.processor).__name__, reason,
    )  # fmt: skip
    return None


def growing_characters(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Characters that a tokenizer's normalizer turns into more UTF-8 bytes, and by how many one grows at most.

    85 under NFC, such as U+0958.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return "", 0
    # What decomposes (Hangul syllables do by rule) or changes its case is all that Unicode's forms and casing touch.
    growth: dict[str, int] = {}
    for character in map(chr, [*range(0x80, 0xD800), *range(0xE000, 0x30000)]):
        if unicodedata.decomposition(character) or "가" <= character <= "힣" or character.lower() != character:
            growth[character] = len(normalizer.normalize_str(f"a{character}").encode()) - len(f"a{character}".encode())
    growing = [character for character, grown in growth.items() if grown > 0]
    return "".join(growing), max([0, *growth.values()])


def _num_tokens(transformer: Transformer, sample: Any) -> int:
    """Length of one input in tokens, without any limit."""
    return int(transformer.preprocess([sample], processing_kwargs=UNLIMITED)["attention_mask"].sum())
