"""Models with a tower for each modality and none that joins them: CLIP and its kind, as one encoder of any input.

An input with several parts is the normalised sum of its parts, a video the normalised sum of its frames, as is usual
for such models. sentence-transformers loads a CLIP that embeds a text or a picture, but refuses both at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

KINDS = ("text", "image", "video")


class SumOfParts(torch.nn.Module):
    """The only module of a SentenceTransformer that adds up what separate towers make of an input's parts.

    Args:
        width: Numbers per embedding.
    """

    modalities = ["text", "image", "video", "message", ("image", "text"), ("text", "video")]

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def get_embedding_dimension(self) -> int:
        """Numbers per embedding."""
        return self._width

    def get_sentence_embedding_dimension(self) -> int:
        """The older name of `get_embedding_dimension`, which mteb asks for."""
        return self._width

    def read(self, kind: str, parts: list[Any], prompt: str) -> dict[str, Any]:
        """Parts of one kind to features.

        Args:
            kind: `text`, `image` or `video`.
            parts: The texts or media.
            prompt: Text that belongs before every text.

        Returns:
            Features of a batch.
        """
        raise NotImplementedError

    def embed(self, kind: str, features: dict[str, Any]) -> torch.Tensor:
        """Features of `read` to embeddings, (parts, width)."""
        raise NotImplementedError

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Inputs to features: all parts of a kind together, and the input that each of them belongs to.

        Args:
            inputs: Strings, pictures, or dicts with `text`, `image` and `video` (a list of pictures, or its `array`).
            prompt: Text put before every text.
            **kwargs: Ignored.

        Returns:
            `<kind> <name>` for every feature, `<kind> owner`, and `count`, whose length is the number of inputs.
        """
        features: dict[str, Any] = {"count": torch.zeros(len(inputs))}
        split = [self._parts(entry) for entry in inputs]
        for kind in KINDS:
            owned = [(owner, part) for owner, parts in enumerate(split) for part in parts.get(kind, ())]
            if owned:
                read = self.read(kind, [part for _, part in owned], prompt or "")
                features |= {f"{kind} {name}": value for name, value in read.items()}
                features[f"{kind} owner"] = torch.tensor([owner for owner, _ in owned], dtype=torch.long)
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`, (inputs, width), of length 1."""
        total = torch.zeros(len(features["count"]), self._width, device=features["count"].device)
        for kind in KINDS:
            own = {name.removeprefix(f"{kind} "): v for name, v in features.items() if name.startswith(f"{kind} ")}
            if own:
                owner = own.pop("owner")
                vectors = F.normalize(self.embed(kind, own), dim=-1).to(total)
                # a video weighs as much as a text however many frames it has: its frames are normalised as one
                total += F.normalize(torch.zeros_like(total).index_add(0, owner, vectors), dim=-1)
        features["sentence_embedding"] = F.normalize(total, dim=-1)
        return features

    def _parts(self, entry: Any) -> dict[str, list[Any]]:
        """An input's parts by kind; the frames of a video are pictures."""
        if not isinstance(entry, Mapping):
            return {"image": [entry]} if isinstance(entry, Image.Image) else {"text": [str(entry)]}
        video = entry.get("video", ())
        frames = video["array"] if isinstance(video, Mapping) else video
        pictures = [*frames, *([entry["image"]] if "image" in entry else [])]
        return {"text": [entry["text"]] if entry.get("text") else [], "image": pictures}


class SeparateTowers(SumOfParts):
    """A SentenceTransformer that embeds texts and pictures, but no input with both.

    Args:
        inner: The model.
    """

    def __init__(self, inner: SentenceTransformer) -> None:
        super().__init__(inner.get_embedding_dimension() or 0)
        self.inner = inner
        self.processor = inner.processor

    def read(self, kind: str, parts: list[Any], prompt: str) -> dict[str, Any]:
        """Parts of one kind to the model's own features."""
        return dict(self.inner.preprocess(parts, prompt=prompt or None))

    def embed(self, kind: str, features: dict[str, Any]) -> torch.Tensor:
        """The model's own embeddings."""
        return self.inner(features)["sentence_embedding"]


def joined(model: SentenceTransformer) -> SentenceTransformer:
    """The model as an encoder of inputs with several parts.

    Args:
        model: Any model.

    Returns:
        The model itself where it takes a picture and a text at once, or can't see at all; else one that adds up what
        it makes of the parts, with the same weights, prompts and truncation.
    """
    if not (model.supports("text") and model.supports("image")) or model.supports(("image", "text")):
        return model
    with model.truncate_embeddings(None):
        module = SeparateTowers(model)
    return SentenceTransformer(
        modules=[module],
        device=str(model.device),
        prompts={name: prompt for name, prompt in model.prompts.items() if prompt is not None},
        default_prompt_name=model.default_prompt_name,
        truncate_dim=model.truncate_dim,
        similarity_fn_name=model.similarity_fn_name,
    )
