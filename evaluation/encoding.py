"""Encoding a task's rows with a SentenceTransformer: media before text, every content once, loaded when needed.

mteb's own wrapper works too, but it shows the text before a video, strips the text of a document, and can't leave out
an absent medium of a mixed batch. This one takes the rows as the loaders wrote them. Embeddings are kept by content,
so candidates that several data sets share (the pages of ViDoSeek-page and -doc) are encoded once per run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import get_prompt_name
from mteb.types import PromptType
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from evaluation.media import StoredFrames

_BATCHES_PER_CALL = 16  # media of that many batches are decoded at once; ST sorts by length within one call


class EmbeddingStore:
    """Embeddings by content, shared by the tasks of one benchmark.

    Args:
        max_items: Number of vectors to keep in memory; the oldest leave first. 200,000 vectors of 1,536 numbers are
            1.2 GB.
    """

    def __init__(self, max_items: int = 200_000) -> None:
        self._max_items = max_items
        self._vectors: dict[tuple[str, ...], np.ndarray] = {}

    def __len__(self) -> int:
        """Number of vectors held."""
        return len(self._vectors)

    def get(self, key: tuple[str, ...]) -> np.ndarray | None:
        """The vector of a content, `None` when it is not held."""
        return self._vectors.get(key)

    def put(self, key: tuple[str, ...], vector: np.ndarray) -> None:
        """Keep a vector."""
        while len(self._vectors) >= self._max_items:
            del self._vectors[next(iter(self._vectors))]
        self._vectors[key] = vector


class MediaFirstEncoder:
    """mteb's encoder interface around a wrapped SentenceTransformer.

    Args:
        wrapper: mteb's wrapper of the model: it holds the model, its prompts and its metadata.
        store: Where embeddings are kept.
    """

    def __init__(self, wrapper: SentenceTransformerEncoderWrapper, store: EmbeddingStore) -> None:
        self._wrapper = wrapper
        self._store = store

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The wrapped model's metadata."""
        return self._wrapper.mteb_model_meta

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The wrapped model's similarity matrix."""
        return self._wrapper.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The wrapped model's row-by-row similarity."""
        return self._wrapper.similarity_pairwise(embeddings1, embeddings2)

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed the rows behind a data loader.

        Args:
            inputs: mteb's loader; its data set is read directly, not its batches.
            task_metadata: Decides the model's prompt.
            hf_split: Unused.
            hf_subset: Unused.
            prompt_type: `query` or `document`.
            **kwargs: Passed to `encode_query` or `encode_document` (`batch_size`, `show_progress_bar`, `pool`, ...).

        Returns:
            float32 (rows, width).
        """
        dataset = _undecoded(inputs.dataset)
        prompts = self._wrapper.model_prompts
        prompt = prompts.get(get_prompt_name(prompts, task_metadata, prompt_type) or "") if prompts else None
        options = {k: v for k, v in kwargs.items() if k not in ("batch_size", "show_progress_bar", "pool")}
        context = (self.mteb_model_meta.revision or "", str(prompt_type), str(prompt), str(sorted(options.items())))
        digests: dict[str, str] = {}
        keys = [(*context, _content(record, digests)) for record in dataset]
        found = {key: self._store.get(key) for key in keys}
        todo = [index for key, index in {key: i for i, key in reversed(list(enumerate(keys)))}.items()
                if found[key] is None]  # fmt: skip
        todo.sort()
        step = _BATCHES_PER_CALL * kwargs.get("batch_size", 32)
        quiet = not kwargs.get("show_progress_bar", True)
        for start in tqdm(range(0, len(todo), step), desc=f"{task_metadata.name} {prompt_type}", disable=quiet):
            chosen = todo[start : start + step]
            for index, vector in zip(
                chosen, self._embed(dataset.select(chosen), prompt, prompt_type, kwargs), strict=True
            ):
                found[keys[index]] = vector
                self._store.put(keys[index], vector)
        return np.stack([vector for key in keys if (vector := found[key]) is not None])

    def _embed(self, rows: Dataset, prompt: str | None, prompt_type: PromptType | None, kwargs: dict) -> np.ndarray:
        model = self._wrapper.model
        encode = model.encode
        if prompt_type is not None:
            encode = model.encode_query if prompt_type == PromptType.query else model.encode_document
        vectors = encode(
            [_as_input(record) for record in rows], prompt=prompt, **{**kwargs, "show_progress_bar": False}
        )
        return np.asarray(vectors, np.float32)


def _undecoded(dataset: Dataset) -> Dataset:
    """The data set with media as stored: image bytes or paths, frame paths."""
    plain = dataset.with_format(None)
    return plain.cast_column("image", Image(decode=False)) if "image" in plain.column_names else plain


def _text(record: dict[str, Any]) -> str:
    return record.get("body") or record.get("text") or ""  # mteb keeps the unstripped text of a document as `body`


def _content(record: dict[str, Any], digests: dict[str, str]) -> str:
    """A hash of everything the model sees of a row; `digests` remembers the files already read."""
    parts = [_text(record)]
    image = record.get("image")
    sources = [image.get("bytes") or image["path"]] if image else []
    for source in [*sources, *(record.get("video") or ())]:
        if isinstance(source, bytes):
            parts.append(hashlib.blake2b(source, digest_size=16).hexdigest())
            continue
        if source not in digests:
            digests[source] = hashlib.blake2b(Path(source).read_bytes(), digest_size=16).hexdigest()
        parts.append(digests[source])
    return hashlib.blake2b("\x00".join([str(len(sources)), *parts]).encode(), digest_size=16).hexdigest()


def _as_input(record: dict[str, Any]) -> dict[str, Any] | str:
    """A row as SentenceTransformer input: `{"image": ..., "text": ...}` in that order, absent parts left out."""
    inputs: dict[str, Any] = {}
    if record.get("image"):
        picture: PILImage.Image = Image().decode_example(record["image"])
        inputs["image"] = picture.convert("RGB")
    if record.get("video"):
        inputs["video"] = StoredFrames(tuple(record["video"])).images()
    if not inputs:
        return _text(record)
    if _text(record).strip():
        inputs["text"] = _text(record)
    return inputs
