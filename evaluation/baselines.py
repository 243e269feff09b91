"""The models that are compared: SentenceTransformers by name, poolings on one backbone, and open_clip.

All of them come back as a SentenceTransformer, so the same commands score them (see `wrapping`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch.nn import functional as F

PoolingName = Literal["lasttoken", "mean", "weightedmean"]
POOLINGS: tuple[PoolingName, ...] = ("lasttoken", "mean", "weightedmean")
OPEN_CLIP = "open_clip:"
"""Prefix of open_clip models on the command line: `open_clip:ViT-B-32/laion2b_s34b_b79k`."""


class OpenClip(torch.nn.Module):
    """An open_clip model as the only module of a SentenceTransformer.

    Text and image are embedded by their towers and normalised; an input with several parts is the normalised sum of
    its parts, a video the normalised sum of its frames, as is usual for models without a fusing layer.

    Args:
        model: The open_clip model.
        preprocess: Its image transform.
        tokenizer: Its tokenizer.
    """

    modalities = ["text", "image", "video", "message", ("image", "text"), ("text", "video")]

    def __init__(self, model: open_clip.CLIP, preprocess: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self._preprocess, self._tokenizer = model, preprocess, tokenizer
        with torch.no_grad():
            self._width = model.encode_text(tokenizer(["width"])).shape[-1]

    def get_embedding_dimension(self) -> int:
        """Numbers per embedding."""
        return self._width

    def get_sentence_embedding_dimension(self) -> int:
        """The older name of `get_embedding_dimension`, which mteb asks for."""
        return self._width

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Inputs to tensors: all texts, all pictures, and the input that each of them belongs to.

        Args:
            inputs: Strings, pictures, or dicts with `text`, `image` and `video` (a list of pictures, or its `array`).
            prompt: Text put before every text.
            **kwargs: Ignored.

        Returns:
            `tokens`, `pictures`, the owner of each, and `count`, whose length is the number of inputs.
        """
        texts, text_owner, pictures, picture_owner = [], [], [], []
        for owner, entry in enumerate(inputs):
            parts = _parts(entry)
            if parts.get("text"):
                texts.append((prompt or "") + parts["text"])
                text_owner.append(owner)
            frames = [*parts.get("video", ()), *([parts["image"]] if "image" in parts else [])]
            pictures += [self._preprocess(frame) for frame in frames]
            picture_owner += [owner] * len(frames)
        return {
            "tokens": self._tokenizer(texts) if texts else torch.zeros(0, 1, dtype=torch.long),
            "token_owner": torch.tensor(text_owner, dtype=torch.long),
            "pictures": torch.stack(pictures) if pictures else torch.zeros(0),
            "picture_owner": torch.tensor(picture_owner, dtype=torch.long),
            "count": torch.zeros(len(inputs)),
        }

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Adds `sentence_embedding`, (inputs, width), of length 1."""
        # a video weighs as much as a text however many frames it has: frames are summed and normalised first
        total = torch.zeros(len(features["count"]), self._width, device=features["count"].device)
        for values, owner, encode in (
            (features["tokens"], features["token_owner"], self.model.encode_text),
            (features["pictures"], features["picture_owner"], self.model.encode_image),
        ):
            if len(owner):
                vectors = F.normalize(encode(values), dim=-1).to(total)
                total += F.normalize(torch.zeros_like(total).index_add(0, owner, vectors), dim=-1)
        features["sentence_embedding"] = F.normalize(total, dim=-1)
        return features


def _parts(entry: Any) -> dict[str, Any]:
    if isinstance(entry, Mapping):
        parts = dict(entry)
        video = parts.get("video", ())
        if isinstance(video, Mapping):  # frames with their metadata
            parts["video"] = video["array"]
        return parts
    return {"image": entry} if isinstance(entry, Image.Image) else {"text": str(entry)}


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


def load_model(name: str, pooling: PoolingName | None = None, device: str | None = None) -> SentenceTransformer:
    """Any model of the command line.

    Args:
        name: SentenceTransformer name or folder, or `open_clip:<architecture>/<weights>`.
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
    return pooled_model(name, pooling, device) if pooling else SentenceTransformer(name, device=device)
