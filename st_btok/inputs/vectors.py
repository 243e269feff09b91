"""Rows of any length to vectors, as a stream: what `encode_checked` and corpus encoding share.

for done in encode_rows(model, rows, task="document"):
    done.row, done.embedding, done.reason
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.util import batch_to_device, truncate_embeddings
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from st_btok.inputs.batching import BATCH_TOKENS, Preparation, Row, ahead, batch_features, batches, windows
from st_btok.inputs.collate import last_token
from st_btok.inputs.fitting import limit_of, with_raised_limit
from st_btok.inputs.reader import reader_for
from st_btok.tokens import btok_ids

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first of them that a model has, as in `encode_document`


@dataclass(frozen=True)
class EncodedRow:
    """What became of one input.

    Attributes:
        row: Its number in the inputs.
        embedding: (D,) on the model's device, or (T, D) of token embeddings; None for a bad row.
        reason: Why it can't be embedded; empty for good rows.
    """

    row: int
    embedding: Any
    reason: str = ""


def encode_rows(
    model: SentenceTransformer,
    inputs: Iterable[Any],
    *,
    task: Literal["query", "document"] | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    allow_urls: bool = False,
    num_frames: int | None = None,
    max_pixels: int | None = None,
    background: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    batch_size: int | None = None,
    output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    device: str | torch.device | None = None,
    processing_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Iterator[EncodedRow]:
    """Embed a stream of inputs of any length in flat memory; bad rows come out with their reason.

    Args:
        model: Any SentenceTransformer.
        inputs: What `checked_inputs` takes, from any iterable; it is read a window ahead.
        task: `"query"` or `"document"`: prompt and route of `encode_query` or `encode_document`. Default: `encode`.
        prompt_name: See `encode`.
        prompt: See `encode`.
        allow_urls: See `checked_inputs`.
        num_frames: See `checked_inputs`.
        max_pixels: See `checked_inputs`.
        background: See `checked_inputs`.
        batch_tokens: Padded tokens of a forward pass, at least 1; a longer row runs alone. More suit a GPU.
        batch_size: Rows of a forward pass at most, at least 1. Default: as many as `batch_tokens` allows.
        output_value: See `encode`.
        normalize_embeddings: See `encode`.
        truncate_dim: See `encode`.
        device: See `encode`; one device.
        processing_kwargs: See `encode`.
        **kwargs: Further arguments of the model's `preprocess` and `forward`.

    Returns:
        An iterator over all rows; rows of a window come in the order of their batches.

    Raises:
        ValueError: If an argument has an unknown value.
    """
    if task not in (None, "query", "document"):
        raise ValueError(f'task must be "query", "document" or None, got {task!r}.')
    if output_value not in ("sentence_embedding", "token_embeddings"):
        raise ValueError(f"output_value must be sentence_embedding or token_embeddings, got {output_value!r}.")
    if batch_tokens < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"batch_tokens and batch_size must be at least 1, got {batch_tokens} and {batch_size}.")
    if isinstance(device, list) or "pool" in kwargs:
        raise ValueError("one process and one device at a time: for several, run recipes.encode_corpus_ray.")
    unknown = set(kwargs) - set(model.get_model_kwargs())
    if unknown:
        raise ValueError(f"this model's encode does not know {sorted(unknown)}. Leave them out.")
    reader = reader_for(
        model, allow_urls=allow_urls, num_frames=num_frames, max_pixels=max_pixels, background=background
    )
    names = {"query": ("query",), "document": _DOCUMENT_PROMPTS}.get(task or "", ())
    if prompt is None and prompt_name is None:
        prompt_name = next((name for name in names if name in model.prompts), None)
    options = {**kwargs, **({"task": task} if task else {})}
    options["processing_kwargs"] = _whole_videos(model, processing_kwargs)
    has_messages = "message" in reader.modalities
    end = _last_btok(model)
    limit = None if end is None else limit_of(model, processing_kwargs)
    if limit is not None:
        options["processing_kwargs"] = with_raised_limit(model, options["processing_kwargs"], limit)
    preparation = Preparation(
        model,
        reader.read,
        {"prompt": _prompt(model, prompt, prompt_name), **options},
        lambda value: batch_key(value, has_messages),
        end,
        limit,
    )
    if device is not None:
        model.to(device)
    target = model.device
    truncate_dim = model.truncate_dim if truncate_dim is None else truncate_dim
    model.eval()

    def run(batch: list[Row]) -> list[Tensor]:
        features = batch_to_device(batch_features(batch, preparation), target)
        return _forward(model, features, options, output_value, normalize_embeddings, truncate_dim)

    return _encode(inputs, preparation, batch_tokens, batch_size, run)


def _last_btok(model: SentenceTransformer) -> int | None:
    """The token that ends every input of a BTok model, K or fewer BToks (`read_budget`); None for other models."""
    tokenizer = getattr(model[0], "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not (ids := btok_ids(tokenizer)):
        return None
    last = last_token(model.preprocess(["a"]))
    return last if last in ids else None


def _prompt(model: SentenceTransformer, prompt: str | None, name: str | None) -> str | None:
    name = model.default_prompt_name if name is None else name
    if prompt is not None or name is None:
        return prompt
    if name not in model.prompts:
        raise ValueError(f"prompt_name must be one of {sorted(model.prompts)}, got {name!r}.")
    return model.prompts[name]


def _encode(inputs: Iterable[Any], preparation: Preparation, tokens: int, size: int | None, run: Any) -> Iterator:
    for window in ahead(windows(enumerate(inputs), preparation)):
        for row in window:
            if row.reason:
                yield from (EncodedRow(number, None, row.reason) for number in row.numbers)
        for batch in batches(window, preparation, tokens, size):
            for row, vector in zip(batch, run(batch), strict=True):
                row.features = row.value = None  # a window's memory goes as its batches do
                yield from (EncodedRow(number, vector) for number in row.numbers)


@torch.inference_mode()
def _forward(
    model: SentenceTransformer,
    features: dict[str, Any],
    options: dict[str, Any],
    output_value: str,
    normalize: bool,
    truncate_dim: int | None,
) -> list[Tensor]:
    """One batch, as `encode` treats it."""
    mask = features.get("attention_mask")
    out = model(features, **options)
    if output_value == "token_embeddings":
        states = out["token_embeddings"]
        return list(states) if mask is None else [row[used.bool()] for row, used in zip(states, mask, strict=True)]
    vectors = out["sentence_embedding"]
    if truncate_dim is not None:
        vectors = truncate_embeddings(vectors, truncate_dim)
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, p=2, dim=1)
    return list(vectors)


def _whole_videos(model: SentenceTransformer, processing_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """The reader has chosen the frames: the processor takes all of them."""
    if "video" not in model.modalities:
        return processing_kwargs
    own = processing_kwargs or {}
    return {**own, "video": {"do_sample_frames": False, **own.get("video", {})}}


def batch_key(value: Any, has_messages: bool) -> Any:
    """Equal for inputs that one call of a processor can take on every family.

    Args:
        value: An input, as read.
        has_messages: Whether the model has a chat template.

    Returns:
        Something hashable.
    """
    if not has_messages:
        return infer_modality(value)
    media = media_of(value)
    # Measured: beside a longer video, SmolVLM misreads a shorter one (0.1), LLaVA-OneVision and InternVL raise.
    frames = {len(item["array"] if isinstance(item, dict) else item) for kind, item in media if kind == "video"}
    rates = {item["sampling_rate"] for kind, item in media if kind == "audio" and isinstance(item, dict)}
    return isinstance(value, list), tuple(sorted(frames)), tuple(sorted(rates))


def media_of(value: Any) -> list[tuple[str, Any]]:
    """Every medium of an input, as read, with its kind.

    Args:
        value: A normalised input.

    Returns:
        Kinds and media, in order.
    """
    if isinstance(value, list):  # a conversation
        contents = [turn["content"] for turn in value if isinstance(turn["content"], list)]
        return [(part["type"], part[part["type"]]) for content in contents for part in content]
    if not isinstance(value, dict) or "array" in value:
        return [(str(infer_modality(value)), value)]
    return [(kind, item) for kind, items in value.items() for item in (items if isinstance(items, list) else [items])]
