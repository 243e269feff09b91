"""The invariants as measurements on one model; `check.py` runs them.

Each is a function of the subject that returns (measured number, bound, what the number is), or raises `NotApplicable`
with the reason. Gradients are compared at the input embedding matrix: they have passed every layer by then, and a 2B
model needs no memory for the others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from st_btok.adapters import btok_lora_config, merge_adapters
from st_btok.limits import UNLIMITED
from st_btok.model_parts import attention_of, embedding_matrix, find_btoks, media_tokens, supports_sdpa
from st_btok.training.cached_loss import CachedBTokLoss
from st_btok.training.content import carry_content, read_back
from st_btok.training.loss import BTokLoss
from st_btok.training.routes import ROUTES
from st_btok.training.splitting import Part

# Two inputs of a kind whose embeddings are closer than this are taken for one: the medium did not get through.
DISTINCT = 1e-4
KINDS = ("text", "image", "several images", "video", "audio")
Measured = tuple[float, float, str]


class NotApplicable(Exception):  # noqa: N818  (not an error: a verdict)
    """A measurement that makes no sense for this model; its text is the reason."""


@dataclass
class Subject:
    """The model under test, the inputs of every kind it takes, and the embeddings of those one by one."""

    model: SentenceTransformer
    owned: bool
    samples: dict[str, list[Any]]
    single: dict[str, np.ndarray] = field(default_factory=dict)
    nll: dict[str, Tensor] = field(default_factory=dict)  # by route, as measured
    _loss: BTokLoss | None = None

    def loss(self) -> BTokLoss:
        """The default loss, made once: making one reads rows back and probes the route."""
        if self._loss is None:
            self._loss = BTokLoss(self.model, lm_head=_any_head(self.model))
        return self._loss

    def all(self) -> tuple[list[Any], np.ndarray]:
        """Inputs of every kind that could be encoded, and their embeddings one by one."""
        samples = [sample for kind in self.single for sample in self.samples[kind]]
        return samples, np.concatenate(list(self.single.values()))

    def columns(self) -> list[dict[str, Any]]:
        """Features of a query and a positive column of two rows, with an image where the model takes images."""
        image = self.samples["image"][0] if "image" in self.single else "Which town?"
        return [self.model.preprocess(["one two", image]), self.model.preprocess(["A red kite.", "Two dogs."])]


def samples_of(modalities: list[str], form: Callable[[np.ndarray], Any] | None = None) -> dict[str, list[Any]]:
    """At least two different inputs of every kind that the backbone takes, with equal texts beside the media.

    `form` is that of a video's frames, see `video_form`; bare frames by default.
    """
    rng = np.random.default_rng(0)

    def image(width: int, height: int) -> Image.Image:
        blocks = rng.integers(0, 255, (height // 14, width // 14, 3), dtype=np.uint8)
        return Image.fromarray(blocks.repeat(14, 0).repeat(14, 1))

    def video() -> Any:
        frames = np.stack([np.asarray(image(56, 56)) for _ in range(4)])
        return frames if form is None else form(frames)

    def sound() -> dict[str, Any]:
        return {"array": rng.standard_normal(8000).astype(np.float32), "sampling_rate": 16_000}

    samples: dict[str, list[Any]] = {"text": ["a", "Which town is it?", "red kittens on a roof " * 3]}
    if "image" in modalities:
        # The first two of each kind differ in nothing but their pixels.
        shapes = [(56, 56), (56, 56), (28, 84)]
        samples["image"] = [{"image": image(*shape), "text": "what?"} for shape in shapes]
        samples["several images"] = [{"image": [image(56, 28), image(28, 28)], "text": "what?"} for _ in range(2)]
    if "video" in modalities:
        samples["video"] = [{"video": video(), "text": "what?"} for _ in range(2)]
    if "audio" in modalities:
        samples["audio"] = [{"audio": sound(), "text": "what?"} for _ in range(2)]
    return samples


# --- encoding -----------------------------------------------------------------------------------------------------


def encode_kind(subject: Subject, kind: str) -> Measured:
    """Inputs of one of the `KINDS`, one by one; their embeddings are kept as what later measurements compare with.

    The smallest distance between two different inputs must be at least `DISTINCT`. A `ValueError` if an embedding is
    not finite and of length 1.
    """
    if kind not in subject.samples:
        raise NotApplicable(f"the backbone takes no {'images' if 'image' in kind else kind}")
    embeddings = np.concatenate([subject.model.encode([sample]) for sample in subject.samples[kind]])
    if not np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-4):
        raise ValueError(f"the embeddings must be finite and of length 1, got {embeddings[:, :4].tolist()}")
    subject.single[kind] = embeddings
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1) + 9 * np.eye(len(embeddings))
    return float(distances.min()), DISTINCT, "smallest distance between different inputs"


def _batch(subject: Subject) -> Measured:
    found = subject.model.encode(subject.samples["text"], batch_size=8)
    return _difference(found, subject.single["text"]), 1e-5, "texts in one batch and one by one"


def _mixed(subject: Subject) -> Measured:
    if len(subject.single) == 1:
        raise NotApplicable("the backbone takes text only")
    samples, single = subject.all()
    found = subject.model.encode(samples, batch_size=len(samples))
    return _difference(found, single), 1e-5, f"{', '.join(subject.single)} in one batch and one by one"


def _unequal_videos(subject: Subject) -> Measured:
    if "video" not in subject.single:
        raise NotApplicable("the backbone takes no video")
    first = subject.samples["video"][0]["video"]
    samples: list[Any] = [{"video": first, "text": "what?"}, {"video": _longer(first), "text": "what?"}]
    expected = np.concatenate([subject.model.encode([sample]) for sample in samples])
    return _difference(subject.model.encode(samples), expected), 1e-5, "4 and 6 frames in one batch and one by one"


def _longer(video: Any) -> Any:
    """A video with half of its frames once more."""
    frames = video["array"] if isinstance(video, dict) else video
    frames = np.concatenate([frames, frames[: len(frames) // 2]])
    if not isinstance(video, dict):
        return frames
    count, times = len(frames), video["video_metadata"]
    times = {**times, "duration": count / 2, "total_num_frames": count, "frames_indices": list(range(count))}
    return {"array": frames, "video_metadata": times}


def _order(subject: Subject) -> Measured:
    samples = subject.samples["text"] + (subject.samples["image"] if "image" in subject.single else [])
    found = subject.model.encode(samples[::-1], batch_size=2)[::-1]
    expected = np.concatenate([subject.single[kind] for kind in ("text", "image") if kind in subject.single])
    return _difference(found, expected), 1e-5, "reversed, in batches of two"


def _padding_side(subject: Subject) -> Measured:
    tokenizer = subject.model.tokenizer
    side = tokenizer.padding_side
    tokenizer.padding_side = "left" if side == "right" else "right"
    try:
        found = subject.model.encode(subject.samples["text"], batch_size=8)
    finally:
        tokenizer.padding_side = side
    return _difference(found, subject.single["text"]), 1e-5, f"{side} and the other"


def _end(subject: Subject) -> Measured:
    transformer, ids = find_btoks(subject.model)
    rows = [transformer.preprocess([sample])["input_ids"][0].tolist() for sample in subject.all()[0]]
    wrong = sum(row[-len(ids) :] != ids or sum(token in ids for token in row) != len(ids) for row in rows)
    return float(wrong), 0.0, f"of {len(rows)} inputs that do not end in the {len(ids)} BToks"


def _text_read_back(subject: Subject) -> Measured:
    transformer, _ = find_btoks(subject.model)
    carry_content(transformer)
    found = read_back(transformer)
    wrong = [f"{kind}: {why}" for kind, why in found.items() if why]
    note = f"of {len(found)} kinds of rows whose own text does not come back"
    return float(len(wrong)), 0.0, f"{note}; {wrong[0]}" if wrong else note


def _truncation(subject: Subject) -> Measured:
    transformer, ids = find_btoks(subject.model)
    media = torch.tensor(list(media_tokens(transformer).values()), dtype=torch.long)
    long, wrong, count = "kitten " * 400, 0, 0
    limits = transformer.processing_kwargs["chat_template"]
    # Room for every medium at its largest, and for less text than there is, where that is possible.
    room = limits.get("image_tokens", 0) * 2 + limits.get("video_tokens", 0) + limits.get("audio_tokens", 0) + 600

    limited: Any = {"text": {"max_length": room}, "chat_template": {"max_tokens": room}}

    def ids_of(sample: Any, limit: Any) -> Tensor:
        return transformer.preprocess([sample], processing_kwargs=limit)["input_ids"][0]

    for kind in subject.single:
        media_of = subject.samples[kind][0] if kind != "text" else {}
        sample, whole = {**media_of, "text": long}, {**media_of, "text": "kitten"}
        cut, full = ids_of(sample, limited), ids_of(whole, UNLIMITED)
        kept = int(torch.isin(cut, media).sum()) == int(torch.isin(full, media).sum())
        wrong += not kept or cut[-len(ids) :].tolist() != ids or len(cut) > room
        wrong += len(ids_of(sample, UNLIMITED)) > room and len(cut) <= len(full)
        count += 1
    return float(wrong), 0.0, f"of {count} over-long inputs that lost BToks or media, or were not cut"


def _reload(subject: Subject) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        types = [module["type"] for module in json.loads((Path(folder) / "modules.json").read_text())]
        if foreign := [name for name in types if not name.startswith("sentence_transformers.")]:
            raise ValueError(f"the checkpoint must hold modules of sentence-transformers only, it has {foreign}")
        if subject.owned:  # from here on the reloaded model is measured, so that there is only one in memory
            del subject.model
        loaded = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32}).eval()
        if subject.owned:
            subject.model = loaded
        found = [loaded.encode([sample]) for kind in subject.single for sample in subject.samples[kind]]
    difference = _difference(np.concatenate(found), subject.all()[1])
    return difference, 1e-6, "saved and loaded by sentence-transformers alone"


def _implementations(subject: Subject) -> Measured:
    backbone: Any = find_btoks(subject.model)[0].model
    config = backbone.config.get_text_config(decoder=True)
    if not supports_sdpa(backbone):
        raise NotApplicable("the backbone has one implementation")
    before, found = attention_of(config), []
    samples = subject.samples["text"] + (subject.samples["image"] if "image" in subject.single else [])

    def use(name: str) -> None:
        try:
            backbone.set_attn_implementation(name)
        except ValueError:  # a tower has one only (Gemma 4's for audio)
            backbone.set_attn_implementation({"text_config": name})

    try:
        for name in ("eager", "sdpa"):
            use(name)
            found.append(np.concatenate([subject.model.encode([sample]) for sample in samples]))
    finally:
        use(before)
    return _difference(*found), 1e-4, "eager and SDPA attention"


# --- training -----------------------------------------------------------------------------------------------------


def _route(subject: Subject, route: Any) -> Measured:
    try:
        loss = BTokLoss(subject.model, route=route, target="positive", lm_head=_any_head(subject.model))
    except ValueError as error:
        raise NotApplicable(first_line(error)) from None
    columns = subject.columns()
    with torch.no_grad():
        expected = subject.model(dict(columns[0]))["sentence_embedding"]
        found = loss.embed(Part(dict(columns[0]), loss.targets(columns)[0]))
    subject.nll[route] = found.nll
    if not (torch.isfinite(found.nll) and found.nll > 0):
        raise ValueError(f"targets must have a finite likelihood, got {found.nll.item()} nats")
    note = "embeddings with and without a target" + ("; leak probe 0" if loss.leak == 0.0 else "")
    return _difference(found.embedding.numpy(), expected.numpy()), 1e-5, note


def _kv_equals_attention(subject: Subject) -> Measured:
    for route in ("attention", "kv"):
        if route not in subject.nll:
            raise NotApplicable(f"the backbone can't use the {route} route")
    attention, kv = subject.nll["attention"], subject.nll["kv"]
    return ((attention - kv).abs() / attention).item(), 1e-4, "likelihood, relative"


def _without_condensation(subject: Subject) -> Measured:
    columns = subject.columns()
    expected = _step(MultipleNegativesRankingLoss(subject.model, scale=50.0), columns)
    found = _step(BTokLoss(subject.model, condensation_weight=0, target="none"), columns)
    return _apart(found, expected), 1e-6, "loss and gradients at condensation_weight=0, relative"


def _gradient_checkpointing(subject: Subject) -> Measured:
    backbone: Any = find_btoks(subject.model)[0].model
    if not backbone.supports_gradient_checkpointing:
        raise NotApplicable("the backbone has none")
    loss, columns = subject.loss(), subject.columns()
    subject.model.train()
    expected = _step(loss, columns)
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        found = _step(loss, columns)
    finally:
        backbone.gradient_checkpointing_disable()
        subject.model.eval()
    return _apart(found, expected), 1e-5, f"loss and gradients on and off, {loss.route} route, relative"


def _cached(subject: Subject) -> Measured:
    loss, columns = subject.loss(), subject.columns()
    expected = _step(loss, columns)
    found = _step(CachedBTokLoss(subject.model, lm_head=_any_head(subject.model), mini_batch_size=1), columns)
    return _apart(found, expected), 1e-5, "loss and gradients with GradCache and without, relative"


def _lora(subject: Subject) -> Measured:
    """Last, because the model is another one afterwards; a model that is not ours is left alone."""
    if not subject.owned:
        raise NotApplicable("measured on backbones only: a finished model is not changed")
    model = subject.model
    before = subject.single["text"]
    model.add_adapter(btok_lora_config(model, r=2, alpha=2, dropout=0.0))
    loss = BTokLoss(model, lm_head=_any_head(model))
    torch.stack(list(loss([dict(column) for column in subject.columns()]).values())).sum().backward()
    moved = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None and parameter.grad.abs().max() > 0:
                parameter.sub_(0.1 * parameter.grad / parameter.grad.norm())
                moved += 1
    adapted = model.encode(subject.samples["text"])
    if not moved or np.abs(adapted - before).max() < DISTINCT:
        raise ValueError(f"{moved} adapter weights got a gradient, and a step along it did not move the embeddings")
    merged = merge_adapters(model).encode(subject.samples["text"])
    return _difference(merged, adapted), 1e-5, "embeddings after one step, merged and not"


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters; its type where it has none."""
    return (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__


def _any_head(model: SentenceTransformer) -> Tensor | None:
    """The tied head, or for an untied one the input matrix: what is measured here holds for any head."""
    backbone = find_btoks(model)[0].model
    tied = getattr(backbone.config, "tie_word_embeddings", False)
    return None if tied else embedding_matrix(backbone).detach()


@contextmanager
def _only_embeddings_train(model: SentenceTransformer) -> Iterator[Tensor]:
    """Gradients pass through every layer to the embedding matrix, and only there is memory for them."""
    matrix = embedding_matrix(find_btoks(model)[0].model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    matrix.requires_grad_(True)
    try:
        yield matrix
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)
        model.zero_grad(set_to_none=True)


def _step(loss: nn.Module, columns: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Value of a loss and its gradient at the embedding matrix."""
    model: Any = loss.model
    with _only_embeddings_train(model) as matrix:
        model.zero_grad(set_to_none=True)
        result = loss([dict(column) for column in columns], None)
        value = torch.stack(list(result.values())).sum() if isinstance(result, dict) else result
        value.backward()
        if matrix.grad is None:
            raise ValueError("no gradient reached the embedding matrix")
        return value.detach(), matrix.grad.clone()


def _apart(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Largest difference of value and gradient, each relative to the largest of what is expected."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


MEASUREMENTS: dict[str, Callable[[Subject], Measured]] = {
    "batch": _batch,
    "mixed modalities": _mixed,
    "videos of unequal length": _unequal_videos,
    "order": _order,
    "padding side": _padding_side,
    "BToks at the end": _end,
    "text read back": _text_read_back,
    "truncation": _truncation,
    "plain reload": _reload,
    "attention implementations": _implementations,
    **{f"{name} route": lambda subject, name=name: _route(subject, name) for name in ROUTES},  # type: ignore[misc]
    "kv = attention": _kv_equals_attention,
    "weight 0 = MNRL": _without_condensation,
    "gradient checkpointing": _gradient_checkpointing,
    "GradCache": _cached,
    "LoRA": _lora,
}
