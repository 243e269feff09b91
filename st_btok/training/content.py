"""The text content of rows: carried from the rows themselves to the losses, beside the token ids.

A loss of sentence-transformers gets features, not rows. What a row's own text is can't be read back out of its token
ids: published chat templates write roles, prompts, dates and time stamps around it as ordinary text, each in a way of
its own. So once a loss is made, the `preprocess` of its model's first module adds two tensors to the features: the ids
of each row's own text, tokenised alone, and the kinds of its media. They pass collator, workers, devices and slicing
like any other tensor, and the model's forward ignores them. Nothing of it is saved.

When a loss is made, rows of every kind that the model takes are sent this way, read back and compared.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor

from st_btok.limits import FITTING, MEDIA_MAY_NOT_FIT, UNLIMITED, video_form
from st_btok.model_parts import CONTENT_KEYS, ignore_in_forward, media_tokens, tokenizer_of
from st_btok.tokens import btok_ids, control_tokens
from st_btok.truncation import TooLongError, truncate_to_limit

_TEXT, _MEDIA = CONTENT_KEYS
# One bit for each kind of medium.
MEDIA_BITS = {"image": 1, "video": 2, "audio": 4}
_NONE = -1  # no id; behind the last one of a row's text
_INSTRUCTIONS = ("system", "developer")  # roles whose turns are no content
# Characters of a text that are tokenised at first, for each token that is asked for; more if they do not suffice.
_CHARS_PER_TOKEN = 16
# A cut through a word can only change the last few tokens.
_SPARE_TOKENS = 16


@dataclass(frozen=True)
class Content:
    """What one row of a column holds."""

    text: Tensor  # ids of its own text, tokenised alone; without prompt, template, BToks and placeholders
    media: int = 0  # the kinds of its media, the sum of their `MEDIA_BITS`

    @property
    def has_media(self) -> bool:
        """Whether it has images, videos or audio."""
        return self.media > 0


def content_reader(transformer: Transformer, max_tokens: int = 64, instructions: Sequence[str] = ()) -> ContentCarrier:
    """Let a model's features carry the content of their rows; rows of every kind must come back as they were given.

    Several losses of one model share the carrier, hence the largest number of ids of one text, and all instructions:
    what data itself writes before the content, inside of the same text, and must not be generated. (Prompts are none:
    they are not part of a row.)

    Args:
        transformer: The model's first module; from now on its `preprocess` adds the content.
        max_tokens: Ids that are needed of one text, at least 1.
        instructions: Beginnings of texts that are left out.

    Returns:
        What carries the content now.

    Raises:
        ValueError: If the tokenizer has no token that closes targets, or rows of some kind do not come back.
    """
    carrier = carry_content(transformer)
    carrier.max_tokens = max(carrier.max_tokens, max_tokens)
    texts = {*carrier.instructions, *(text.lstrip() for text in instructions if text.strip())}
    carrier.instructions = sorted(texts, key=len, reverse=True)
    if carrier.end == _NONE:
        end = closing_token(transformer)
        for kind, why in read_back(transformer).items():
            if why:
                raise ValueError(
                    f"what a row generates must be its own text, but rows of the kind {kind!r} do not come back: "
                    f'{why} Fix the chat template or tokenizer, or build the model with template="plain"; '
                    'BTokLoss(model, target="none", condensation_weight=0) generates nothing.'
                )
        carrier.end = end
    return carrier


def read_content(features: dict[str, Any]) -> list[Content]:
    """Content of the B rows of one column, from features that its carrier made; else a `ValueError`."""
    if _TEXT not in features:
        raise ValueError(
            "a column's features must carry the content of their rows, but these have only "
            f"{sorted(features)}: they were made before the loss, or not by the preprocess of the loss' model. Make "
            "the loss first, then call model.preprocess."
        )
    # Lists, each with one wait for the device, whatever the number of rows.
    rows, media = features[_TEXT].tolist(), features[_MEDIA].tolist()
    texts = [torch.tensor([token for token in ids if token != _NONE], dtype=torch.long) for ids in rows]
    return [Content(text, kinds) for text, kinds in zip(texts, media, strict=True)]


def carry_content(transformer: Transformer) -> ContentCarrier:
    """Let a module's `preprocess` add the content of rows to their features, in place; once only."""
    present = vars(transformer).get("preprocess")
    if isinstance(present, ContentCarrier):
        return present
    ignore_in_forward(*CONTENT_KEYS)
    carrier = ContentCarrier(transformer)
    transformer.preprocess = carrier  # type: ignore[assignment, method-assign]
    return carrier


class ContentCarrier:
    """A `preprocess` whose features carry the content of their rows.

    An object and not a closure: it is copied with its module, and sent to the workers of a data loader.
    """

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer
        self.max_tokens = 64  # ids that are carried of one text at most
        self.instructions: list[str] = []  # beginnings of texts that are left out, longest first
        self.end = _NONE  # the id that closes targets, once rows of every kind came back
        self.media_tokens = media_tokens(transformer)
        tokenizer = tokenizer_of(transformer)
        names = control_tokens(tokenizer, str(tokenizer.chat_template))
        self.control = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def __call__(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """As `Transformer.preprocess`; the features also hold the content. A `ValueError` if a row is None."""
        module = self.transformer
        for number, row in enumerate(inputs):
            if row is None:
                raise ValueError(
                    f"every column must hold a value in every row, but row {number} of this batch is None. Leave such "
                    "rows out of the data set."
                )
        inputs = [without_missing(row) for row in inputs]
        features = self._preprocess(inputs, prompt=prompt, **options)
        if not features or torch.is_inference_mode_enabled():  # `encode`
            return features
        rows = contents_of(module, inputs)
        ids = [torch.tensor(self.ids_of(text), dtype=torch.long) for text, _ in rows]
        features[_TEXT] = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=_NONE)
        features[_MEDIA] = torch.tensor([media for _, media in rows])
        return features

    def _preprocess(self, inputs: Sequence[Any], **options: Any) -> dict[str, Any]:
        """The module's own `preprocess`. Where the saved template refuses media that may not fit, they are counted."""
        module: Any = self.transformer
        own = partial(type(module).preprocess, module)
        try:
            return dict(own(inputs, **options))
        except TemplateError as error:
            if not str(error).startswith(MEDIA_MAY_NOT_FIT) or options.get("processing_kwargs"):
                raise  # a call with limits or sizes of its own is not made with others

        def whole(row: Any) -> dict[str, Any]:
            return dict(own([row], **{**options, "processing_kwargs": UNLIMITED}))

        fitting = list(inputs)
        for number, (text, media) in enumerate(contents_of(module, inputs)):
            try:
                if media or isinstance(inputs[number], list):  # sentence-transformers cuts all others
                    fitting[number], _ = truncate_to_limit(
                        inputs[number], whole, module.max_seq_length, tokenizer_of(module)
                    )
            except TooLongError as error:
                raise ValueError(f"row {number} of a batch, with the text {text[:60]!r}: {error}.") from None
        return dict(own(fitting, **{**options, "processing_kwargs": FITTING}))

    def ids_of(self, text: str) -> list[int]:
        """The first `max_tokens` ids of a row's text, without blanks at its ends; control tokens' names are text."""
        text = text.strip()
        for instruction in self.instructions:
            if text.startswith(instruction) or text == instruction.rstrip():
                text = text[len(instruction) :].strip()
                break
        tokenizer, size = tokenizer_of(self.transformer), _CHARS_PER_TOKEN * self.max_tokens
        if not text:
            return []
        while True:
            own = self.control.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text[:size])
            ids = tokenizer(own, add_special_tokens=False, verbose=False)["input_ids"]
            if size >= len(text) or len(ids) >= self.max_tokens + _SPARE_TOKENS:
                return ids[: self.max_tokens]
            size *= 4


def without_missing(row: Any) -> Any:
    """A row without its missing parts: Arrow fills a struct column with None where one row has no image."""
    if not isinstance(row, dict) or "role" in row:
        return row
    given = {key: value for key, value in row.items() if value is not None}
    return given or row


def contents_of(transformer: Transformer, inputs: Sequence[Any]) -> list[tuple[str, int]]:
    """Each row's own text, turns but instructions one below the other, and the sum of its `MEDIA_BITS`."""
    formatter = transformer.input_formatter
    modality, values, _ = formatter.parse_inputs(inputs)
    if modality != "message":
        _, values = formatter.batch_to_message(modality, values)
    return [_content_of(messages) for messages in values["message"]]


def _content_of(messages: Sequence[Any]) -> tuple[str, int]:
    turns, media = [], 0
    for message in messages:
        if message.get("role") in _INSTRUCTIONS:
            continue
        parts = message.get("content") or []
        text = ""
        for part in [parts] if isinstance(parts, str | dict) else parts:
            if isinstance(part, str):
                text += part
            elif "role" in part or part.get("type") == "message":  # a conversation among rows of other kinds
                inner, kinds = _content_of([part] if "role" in part else part["message"])
                text, media = text + ("\n" if text else "") + inner, media | kinds
            elif isinstance(part.get("text"), str):
                text += part["text"]
            else:
                media |= next((bit for kind, bit in MEDIA_BITS.items() if kind in str(part.get("type"))), 0)
        turns.append(text)
    return "\n".join(turn for turn in turns if turn), media


def closing_token(transformer: Transformer) -> int:
    """Id of the token that closes a reply: the first control token behind the assistant's words, else EOS."""
    tokenizer = tokenizer_of(transformer)
    names: Any = control_tokens(tokenizer, str(tokenizer.chat_template))
    control = {tokenizer.convert_tokens_to_ids(name) for name in names} - {*btok_ids(tokenizer)}
    structured = transformer.modality_config["message"].get("format") == "structured"
    rendered: list[list[int]] = []
    for reply in ("0", "1 2 3 4"):
        turns: Any = [
            {"role": role, "content": [{"type": "text", "text": text}] if structured else text}
            for role, text in (("user", "5"), ("assistant", reply))
        ]
        try:
            rendered.append(transformer.preprocess([turns], processing_kwargs=UNLIMITED)["input_ids"][0].tolist())
        except Exception:  # a template raises what it likes
            break
    tail = os.path.commonprefix([row[::-1] for row in rendered])[::-1] if len(rendered) == 2 else []
    end = next((token for token in tail if token in control), tokenizer.eos_token_id)
    if end is None:
        raise ValueError("the tokenizer needs an end-of-turn token to close targets. Set tokenizer.eos_token.")
    return int(end)


def read_back(transformer: Transformer) -> dict[str, str]:
    """Send rows of every kind through `preprocess` and compare what comes back with what they are.

    For each kind, with and without a prompt, why it is wrong; empty for those that come back exactly. Kinds that the
    model does not take, because its processor or template raises, are left out; what it raises at a text is raised.
    """
    found: dict[str, str] = {}
    for kind, rows, truths in _probes(transformer):
        for prompt in (None, "Find it: "):
            try:
                features = transformer.preprocess(rows, prompt=prompt, processing_kwargs=UNLIMITED)
            except Exception:  # processors and templates raise what they like
                if not found:
                    raise
                continue
            why = [_difference(transformer, features, index, truth) for index, truth in enumerate(truths)]
            found[f"{kind}, with a prompt" if prompt else kind] = next(filter(None, why), "")
    return found


def _difference(transformer: Transformer, features: dict[str, Any], row: int, truth: tuple[str, int]) -> str:
    """Why one row is wrong; empty where its content is its own, and its text stands in what the model reads."""
    tokenizer, (text, media) = tokenizer_of(transformer), truth
    content = read_content(features)[row]

    def decoded(ids: Any) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()

    own = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    expected = decoded(own)  # some tokenizers lose letters, such as capitals
    if decoded(content.text) not in (text, expected) or content.media != media:
        return f"{decoded(content.text)!r} with media {content.media} instead of {text!r} with {media}."
    read = decoded(features["input_ids"][row][features["attention_mask"][row].bool()])
    missing = [line for line in expected.split("\n") if "".join(line.split()) not in "".join(read.split())]
    return f"the chat template leaves {missing[0]!r} out of {read!r}." if missing else ""


def _probes(transformer: Transformer) -> Iterator[tuple[str, list[Any], list[tuple[str, int]]]]:
    """Kinds of rows, rows of that kind, and their contents."""
    text, lines = "a red kite", "\n\na red kite\n\nand two boats\n"
    yield "text", [text], [(text, 0)]
    yield "text with newlines at both ends", [lines], [(lines.strip(), 0)]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    yield "conversation", [turns], [(text, 0)]
    yield "texts and a conversation", ["two boats", {"text": text}, turns], [("two boats", 0), (text, 0), (text, 0)]
    media: dict[str, list[Any]] = {
        "image": [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")],
        "video": [np.zeros((2, 56, 56, 3), np.uint8)],
        "audio": [{"array": np.zeros(8000, np.float32), "sampling_rate": 16_000}],
    }
    for kind, items in media.items():
        if kind not in transformer.modality_config:
            continue
        if kind == "video":
            form = video_form(transformer)
            if form is None:
                continue
            items = [form(item) for item in items]
        bit = MEDIA_BITS[kind]
        yield kind, [{kind: items[0]}], [("", bit)]
        yield f"{kind} before text", [{kind: items[0], "text": lines}], [(lines.strip(), bit)]
        yield f"text before {kind}", [{"text": lines, kind: items[0]}], [(lines.strip(), bit)]
        if len(items) > 1:
            yield f"several {kind}s", [{kind: items, "text": text}], [(text, bit)]
        parts = [{"type": kind, kind: items[0]}, {"type": "text", "text": text}]
        yield f"conversation with {kind}", [[{"role": "user", "content": parts}]], [(text, bit)]
