"""Does a server give the vectors of sentence-transformers? `st-btok serve-check URL --model PATH`.

Texts, images, both together, a text over the limit and texts that quote control tokens go to an OpenAI-compatible
server in every form of request that people send, and each answer is compared, row by row, with
`SentenceTransformer(PATH).encode`. A form is `equal`, `refused` (an HTTP error, which nobody takes for a vector) or
`WRONG`: an answer without an error that is another vector.

The right form is `messages` with the saved limits as `chat_template_kwargs`; there a text over the limit is refused,
as only sentence-transformers cuts by tokens and keeps the BToks. Where the server returns the states of
single tokens (`/pooling`), the mean over the last K of them is right as well.
"""

from __future__ import annotations

import base64
import io
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from json import dumps, load, loads
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import WordWeights

from st_btok.model_parts import find_btoks

BOUND = 1e-4  # float32 on both sides gives 1e-7 to 1e-6; the wrong forms seen so far give 1e-2 and more
TIMEOUT = 120  # seconds
LONG = "long text"


@dataclass(frozen=True)
class Row:
    """One input in both languages."""

    name: str  # what it tries
    sample: Any  # as `encode` takes it
    content: list[dict[str, Any]]  # as the `content` of an OpenAI message

    @property
    def text(self) -> str | None:
        """The text of an input that is nothing else."""
        return self.sample if isinstance(self.sample, str) else None


@dataclass(frozen=True)
class Answer:
    """What one form of request gave for one row."""

    form: str  # a key of `FORMS`
    row: str
    verdict: Literal["equal", "refused", "WRONG"]
    difference: float | None = None  # largest of an entry; None where there was no vector
    cosine: float | None = None  # to the expected vector
    note: str = ""  # the server's message


@dataclass(frozen=True)
class Served:
    """The server and the model that it should compute."""

    url: str  # without a path, such as http://localhost:8000
    name: str  # of the served model
    template: dict[str, Any]  # the saved arguments of the chat template, which bound an input's length
    num_btoks: int  # K

    def post(self, path: str, **body: Any) -> Any:
        """Send one request and return the first entry of its `data`."""
        data = dumps({"model": self.name, "encoding_format": "float", **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return load(response)["data"][0]


@dataclass(frozen=True)
class Form:
    """A form of request."""

    advice: str  # what to do instead, where its answers are wrong
    limits: bool = False  # whether the saved limits go along as `chat_template_kwargs`
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the request


RIGHT, TOKEN_STATES, BARE = "messages", "token states", "input"
_CUT = {"truncate_prompt_tokens": -1}
FORMS = {
    RIGHT: Form("the engine does not compute this model; docs/serve.md has the engines that do", limits=True),
    "messages, no limits": Form("send the saved limits as chat_template_kwargs"),
    "messages, add_generation_prompt": Form(
        "leave it out: the model was saved by an older release", limits=True, options={"add_generation_prompt": True}
    ),
    "messages, truncate_prompt_tokens": Form("it cuts bottleneck tokens off: send chat_template_kwargs", options=_CUT),
    BARE: Form("it skips the chat template, which guards text and appends the bottleneck tokens: send messages"),
    f"{BARE}, truncate_prompt_tokens": Form(
        "it skips the chat template: send messages, and cut text before", options=_CUT
    ),
    TOKEN_STATES: Form("average the last K rows of a model with readout='mean', and normalise", limits=True),
}


def _vector(served: Served, form: str, row: Row) -> np.ndarray:
    """What the server gives for a row in one form of request."""
    how = FORMS[form]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": row.content}]}
    if form.startswith(BARE):
        body = {"input": row.text}
    if how.limits:
        body["chat_template_kwargs"] = served.template
    if form != TOKEN_STATES:
        return np.asarray(served.post("/v1/embeddings", **body, **how.options)["embedding"], np.float32)
    states = np.asarray(served.post("/pooling", **body)["data"], np.float32)  # (T, D)
    if states.ndim != 2:
        raise ValueError("the server pools by itself, it gives no states of single tokens")
    mean = states[-served.num_btoks :].mean(0)
    return mean / np.linalg.norm(mean)


def serve_check(
    url: str,
    model: str | Path | SentenceTransformer,
    name: str | None = None,
    bound: float = BOUND,
    progress: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Compare a server with sentence-transformers: one answer for each form of request and row.

    `url` is the root of an OpenAI-compatible server, such as `http://localhost:8000`; `name` the served model's, by
    default the first one that `/v1/models` lists; `bound` the largest difference of an entry that counts as equal.
    `progress` is called with each answer. Rows with media have no answer for `"input"`, and models with
    `readout="last"` none for the token states. A `ConnectionError` if nothing answers, a `ValueError` if the model is
    no BTok model, or none is listed.
    """
    encoder = model if isinstance(model, SentenceTransformer) else SentenceTransformer(str(model))
    transformer, ids = find_btoks(encoder)
    rows = rows_of(transformer, ids)
    url = url.rstrip("/").removesuffix("/v1")
    served = Served(url, name or _served_name(url), _template_arguments(transformer), len(ids))
    # Without the model's default prompt, which a request has no place for but a system message of its own.
    expected = encoder.encode([row.sample for row in rows], prompt="", batch_size=1, normalize_embeddings=True)
    answers = []
    averages = any(isinstance(module, WordWeights) for module in encoder)
    for form in FORMS:
        if form == TOKEN_STATES and not averages:
            continue
        for row, vector in zip(rows, expected, strict=True):
            if form.startswith(BARE) and row.text is None:
                continue
            answers.append(_answer(form, served, row, np.asarray(vector), bound))
            if progress is not None:
                progress(answers[-1])
    return answers


def rows_of(transformer: Transformer, btok_ids: list[int]) -> list[Row]:
    """The inputs: what people send, what is over the limit, and what tries to forge control tokens.

    Of every kind that the model takes.
    """
    tokenizer: Any = transformer.tokenizer
    btok, end = tokenizer.convert_ids_to_tokens(btok_ids[0]), tokenizer.eos_token
    limit = tokenizer.model_max_length
    texts = {
        "text": "Which of the two towns lies by the sea?",
        "blanks at its ends": "\n\n  a red kite \n",
        "other scripts": "Ein Drachen über Zürich, 東京の夜, ночь",
        "forged BTok": f"a text that quotes {btok} and goes on",
        "forged end of turn": f"a text that quotes {end} and goes on",
        LONG: "A red kite stands over the field. " * (limit // 4 + 1),
    }
    rows = [Row(name, text, [{"type": "text", "text": text}]) for name, text in texts.items()]
    if "image" in transformer.modality_config:
        blocks = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8).repeat(14, 0).repeat(14, 1)
        image, file = Image.fromarray(blocks), io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        part, text = {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}
        rows.append(Row("image", {"image": image}, [part]))
        rows.append(Row("image and text", {"image": image, "text": "What is it?"}, [part, text]))
    return rows


def _template_arguments(transformer: Transformer) -> dict[str, Any]:
    """What sentence-transformers passes to the chat template; the template itself the engine has by itself."""
    saved = dict(transformer.processing_kwargs.get("chat_template", {}))
    return {name: value for name, value in saved.items() if name not in ("chat_template", "restore_suffix")}


def _served_name(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=TIMEOUT) as response:
            listed = load(response)["data"]
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}/v1/models answers {error.code}. Name the served model (--name).") from error
    except OSError as error:
        raise ConnectionError(f"no server answers at {url} ({error}). Start it first, or correct the URL.") from error
    if not listed:
        raise ValueError(f"{url}/v1/models lists no model. Name the served model (--name).")
    return listed[0]["id"]


def _answer(form: str, served: Served, row: Row, expected: np.ndarray, bound: float) -> Answer:
    """Send one row in one form."""
    try:
        vector = _vector(served, form, row)
    except urllib.error.HTTPError as error:
        return Answer(form, row.name, "refused", note=f"{error.code}: {_message(error)}")
    except (OSError, KeyError, ValueError) as error:  # no JSON, no vector in it, a server that went away
        return Answer(form, row.name, "refused", note=f"{type(error).__name__}: {error}")
    if vector.shape != expected.shape:
        return Answer(form, row.name, "WRONG", note=f"shape {vector.shape} instead of {expected.shape}")
    difference = float(np.abs(vector - expected).max())
    cosine = float(vector @ expected / max(np.linalg.norm(vector) * np.linalg.norm(expected), 1e-9))
    return Answer(form, row.name, "equal" if difference <= bound else "WRONG", difference, cosine)


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words, in one line."""
    text = error.read().decode(errors="replace")
    try:
        text = loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:160]


def summary(answers: list[Answer]) -> list[str]:
    """One line for each form of request: the worst verdict, the worst row with its numbers, and what to do."""
    lines = []
    for form, how in FORMS.items():
        own = [answer for answer in answers if answer.form == form]
        wrong = [answer for answer in own if answer.verdict == "WRONG"]
        refused = [answer for answer in own if answer.verdict == "refused"]
        compared = [answer for answer in own if answer.difference is not None]
        if wrong:
            worst = min(wrong, key=lambda answer: -1.0 if answer.cosine is None else answer.cosine)
            rows = ", ".join(answer.row for answer in wrong)
            seen = worst.note if worst.cosine is None else f"cosine {worst.cosine:.3f} on {worst.row!r}"
            text = f"WRONG    {seen}; wrong rows: {rows}. {how.advice}"
        elif not own:
            continue
        elif compared:
            text = f"equal    {max(answer.difference or 0.0 for answer in compared):.1e} over {len(compared)} rows"
            text += f"; refused: {', '.join(answer.row for answer in refused)}" if refused else ""
        else:
            text = f"refused  {refused[0].note}"
        lines.append(f"{form:<34}{text}")
    return lines


def serves(answers: list[Answer]) -> bool:
    """Whether `messages` or the token states are equal in every row.

    A text over the limit may be refused instead: sentence-transformers cuts it by tokens, which no engine does alike.
    """
    for form in (RIGHT, TOKEN_STATES):
        own = {answer.row: answer.verdict for answer in answers if answer.form == form}
        right = [verdict == "equal" or (row, verdict) == (LONG, "refused") for row, verdict in own.items()]
        if own and all(right):
            return True
    return False


def main(url: str, model: str, name: str | None, bound: float, json: Path | None) -> int:
    """The command `st-btok serve-check`; its arguments are described in `tools/command.py`.

    Returns 1 if no right form of request is equal in every row (or refuses the one over the limit), else 0.
    """
    encoder = SentenceTransformer(model, model_kwargs={"dtype": "float32"})
    answers = serve_check(url, encoder, name, bound, progress=_show)
    print("\n" + "\n".join(summary(answers)))
    if json:
        json.write_text(dumps([asdict(answer) for answer in answers], indent=1) + "\n")
    print("served as sentence-transformers does" if serves(answers) else "NOT served as sentence-transformers does")
    return 0 if serves(answers) else 1


def _show(answer: Answer) -> None:
    """One line for each answer, as soon as it is there."""
    number = "" if answer.difference is None else f"{answer.difference:.1e}"
    print(f"{answer.verdict:<8} {answer.form:<34}{answer.row:<20}{number:<9}{answer.note}".rstrip(), flush=True)
