"""The models that are compared: SentenceTransformers by name, poolings on one backbone, and open_clip.

All of them come back as a SentenceTransformer, or as the MultiVectorEncoder that a checkpoint was saved from, so the
same commands score them (see `wrapping`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import load_file_path

from evaluation.dataset import POOLINGS, PoolingName
from evaluation.sum_of_parts import SumOfParts

OPEN_CLIP = "open_clip:"
"""Prefix of open_clip models on the command line: `open_clip:ViT-B-32/laion2b_s34b_b79k`."""


_MULTI_VECTOR = ("MultiVectorEncoder", "ColBERT")  # sentence-transformers' name, and PyLate's


class OpenClip(SumOfParts):
    """An open_clip model as the only module of a SentenceTransformer.

    Args:
        model: The open_clip model.
        preprocess: Its image transform.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: open_clip.CLIP, preprocess: Any, tokenizer: Any) -> None:
        with torch.no_grad():
            super().__init__(model.encode_text(tokenizer(["width"])).shape[-1])
        self.model, self._preprocess, self._tokenizer = model, preprocess, tokenizer

    def read(self, kind: str, parts: list[Any], prompt: str) -> dict[str, torch.Tensor]:
        """Texts through the tokenizer, pictures through the image transform."""
        if kind == "text":
            return {"values": self._tokenizer([prompt + text for text in parts])}
        return {"values": torch.stack([self._preprocess(picture) for picture in parts])}

    def embed(self, kind: str, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tower of that kind."""
        return (self.model.encode_text if kind == "text" else self.model.encode_image)(features["values"])

    def get_config_dict(self) -> dict[str, str]:
        """What decides an embedding beside the weights: the layers as they print, the transform, the tokenizer."""
        sizes = {name: getattr(self._tokenizer, name, None) for name in ("context_length", "vocab_size")}
        parts = {"layers": self.model, "transform": self._preprocess, "tokenizer": self._tokenizer, "sizes": sizes}
        return {name: re.sub(" at 0x[0-9a-f]+", "", repr(part)) for name, part in parts.items()}  # not where it lies


def open_clip_model(name: str, pretrained: str | None = None, device: str = "cpu") -> SentenceTransformer:
    """An open_clip model with the interface of a SentenceTransformer.

    Args:
        name: Architecture (`ViT-B-32`), `hf-hub:owner/name` or `local-dir:/folder`.
        pretrained: Weights of an architecture, a tag or a file; needed for a bare architecture.
        device: Device.

    Returns:
        The model.

    Raises:
        ValueError: A bare architecture without weights: its scores would be chance.
    """
    if pretrained is None and ":" not in name:
        tags = [tag for architecture, tag in open_clip.list_pretrained() if architecture == name]
        raise ValueError(f"{name} names an architecture without weights: add one of {tags}, as in {name}/{tags[:1]}")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
    module = OpenClip(model.eval(), transform, open_clip.get_tokenizer(name))
    return SentenceTransformer(modules=[module], device=device)


def pooled_model(backbone: str | Path, pooling: PoolingName, device: str | None = None) -> SentenceTransformer:
    """A backbone with a pooling that needs no training: what bottleneck tokens are compared with.

    Args:
        backbone: Name or folder of a transformers checkpoint.
        pooling: `lasttoken`, `mean` or `weightedmean` (later tokens weigh more).
        device: Device, default the best there is.

    Returns:
        Transformer, pooling, normalisation.

    Raises:
        ValueError: Another pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    transformer = Transformer(str(backbone))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), Normalize()]
    return SentenceTransformer(modules=modules, device=device)


def load_model(
    name: str, pooling: PoolingName | None = None, device: str | None = None
) -> SentenceTransformer | MultiVectorEncoder:
    """Any model of the command line.

    Args:
        name: SentenceTransformer or MultiVectorEncoder, name or folder, or `open_clip:<architecture>/<weights>`.
        pooling: Read `name` as a backbone and pool it this way.
        device: Device, default the best there is.

    Returns:
        The model, not yet wrapped.
    """
    if name.startswith(OPEN_CLIP):
        source = name.removeprefix(OPEN_CLIP)
        bare = ":" not in source
        architecture, _, weights = source.partition("/") if bare else (source, "", "")
        return open_clip_model(architecture, weights or None, device or "cpu")
    if pooling:
        return pooled_model(name, pooling, device)
    if _saved_kind(name) in _MULTI_VECTOR:
        return MultiVectorEncoder(name, device=device)
    return SentenceTransformer(name, device=device)


def _saved_kind(name: str) -> str:
    """The class that a checkpoint was saved from, empty where it doesn't say."""
    file = load_file_path(name, "config_sentence_transformers.json")
    return json.loads(Path(file).read_text(encoding="utf-8")).get("model_type", "") if file else ""
