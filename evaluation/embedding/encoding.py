"""Encoding a task's rows with a model: media before text, every content once, loaded when needed.

mteb's own wrapper works too, but it shows the text before a video, strips the text of a document, and can't leave out
an absent medium of a mixed batch. This one takes the rows as the loaders wrote them. Embeddings are kept by content
(`store.py`), so candidates that several data sets share (the pages of ViDoSeek-page and -doc) are encoded once, and at
full width, so every `truncate_dim` of a model is scored from one encoding. A model with many vectors per input
(`MultiVectorEncoder`) is shown the same rows; its vectors are not kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from mteb.models import ModelMeta, MultiVectorWrapper, SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import get_prompt_name
from mteb.types import PromptType
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from evaluation.embedding.fingerprint import fingerprint
from evaluation.embedding.store import EmbeddingStore, content_key
from evaluation.finite import check_finite
from evaluation.media import PROMPT_COLUMN, StoredFrames, read_image
from evaluation.sum_of_parts import joined

_BATCHES_PER_CALL = 16  # media of that many batches are decoded, and written as one shard; ST sorts within one call
_FULL_WIDTH = 2**31 - 1
_FORM = "form 2"  # raise it whenever `as_input` shows a row differently: stored embeddings are then made again


class MediaFirstEncoder:
    """mteb's encoder interface around a wrapped SentenceTransformer.

    Args:
        wrapper: mteb's wrapper of the model: it holds the model, its prompts and its metadata.
        store: Where embeddings are kept.
        instructed: The sides whose inputs bring an instruction of the task's own, which takes the place of the
            model's prompt.
    """

    def __init__(
        self,
        wrapper: SentenceTransformerEncoderWrapper,
        store: EmbeddingStore,
        instructed: Collection[PromptType] = (),
    ) -> None:
        self._wrapper = wrapper
        self._model = joined(wrapper.model)
        self._store = store
        self._instructed = frozenset(instructed)

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
        own = own_prompt(self._wrapper, task_metadata, prompt_type)
        result = np.zeros((len(dataset), 0), np.float32)
        for whole, rows in _by_prompt(dataset, "" if prompt_type in self._instructed else own):
            vectors = self._encode_rows(dataset.select(rows), whole, task_metadata.name, prompt_type, kwargs)
            result = np.zeros((len(dataset), vectors.shape[1]), np.float32) if not result.shape[1] else result
            result[rows] = vectors
        return result[:, : self._model.truncate_dim]

    def _encode_rows(
        self, dataset: Dataset, prompt: str | None, task: str, prompt_type: PromptType | None, kwargs: dict[str, Any]
    ) -> np.ndarray:
        """Rows with one prompt, at full width: those that the store holds, and the others, which it then holds."""
        options = {k: v for k, v in kwargs.items() if k not in ("batch_size", "show_progress_bar", "pool")}
        space = content_key(
            fingerprint(self._wrapper.model, truncation=False),
            _FORM,
            f"{prompt_type} {prompt} {sorted(options.items())}",
        )
        digests: dict[str, bytes] = {}
        keys = [_content(record, digests) for record in dataset]
        found = {key: vector for key, vector in self._store.get(space, keys).items() if np.isfinite(vector).all()}
        todo = sorted({key: row for row, key in enumerate(keys) if key not in found}.values())
        step = _BATCHES_PER_CALL * kwargs.get("batch_size", 32)
        quiet = not todo or not kwargs.get("show_progress_bar", True)
        with tqdm(total=len(todo), desc=f"{task} {prompt_type}", unit="input", disable=quiet) as bar:
            for start in range(0, len(todo), step):
                chosen = todo[start : start + step]
                vectors = self._embed(dataset.select(chosen), prompt, prompt_type, kwargs)
                check_finite(vectors, [str(dataset[row]["id"]) for row in chosen], f"{task}, {prompt_type}")
                made = {keys[row]: vector for row, vector in zip(chosen, vectors, strict=True)}
                self._store.put(space, made)
                found |= made
                bar.update(len(chosen))
        return np.stack([found[key] for key in keys])

    def _embed(self, rows: Dataset, prompt: str | None, prompt_type: PromptType | None, kwargs: dict) -> np.ndarray:
        encode: Any = self._model.encode
        if prompt_type is not None:
            encode = self._model.encode_query if prompt_type == PromptType.query else self._model.encode_document
        # a width no model has: the vectors are kept whole, whatever the model's own truncation
        options = {**kwargs, "show_progress_bar": False, "truncate_dim": _FULL_WIDTH}
        vectors = encode([as_input(record) for record in rows], prompt=prompt, **options)
        return np.asarray(vectors, np.float32)


class MediaFirstMultiVector(MultiVectorWrapper):
    """mteb's wrapper of a `MultiVectorEncoder`, which is shown rows as `MediaFirstEncoder` shows them.

    mteb scores by MaxSim: of every query vector the largest similarity to a candidate's vectors, summed. The vectors
    of a data set's candidates lie in memory while it is scored, and are made again for the next one.

    Args:
        wrapper: mteb's wrapper of the model.
        instructed: As in `MediaFirstEncoder`.
    """

    def __init__(self, wrapper: MultiVectorWrapper, instructed: Collection[PromptType] = ()) -> None:
        super().__init__(wrapper.model, corpus_chunk_size=wrapper.corpus_chunk_size)
        self.mteb_model_meta, self.model_prompts = wrapper.mteb_model_meta, wrapper.model_prompts
        self._instructed = frozenset(instructed)

    def _encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """A float tensor (vectors of the row, width) on the CPU for each row."""
        dataset = _undecoded(inputs.dataset)
        own = own_prompt(self, task_metadata, prompt_type)
        encode: Any = self.model.encode_query if prompt_type == PromptType.query else self.model.encode_document
        options = {**kwargs, "show_progress_bar": False}
        step = _BATCHES_PER_CALL * kwargs.get("batch_size", 32)
        found: dict[int, torch.Tensor] = {}
        quiet = not kwargs.get("show_progress_bar", True)
        with tqdm(total=len(dataset), desc=f"{task_metadata.name} {prompt_type}", unit="input", disable=quiet) as bar:
            for whole, rows in _by_prompt(dataset, "" if prompt_type in self._instructed else own):
                for start in range(0, len(rows), step):
                    chosen = rows[start : start + step]
                    records = [as_input(record) for record in dataset.select(chosen)]
                    vectors = [vector.cpu() for vector in encode(records, prompt=whole, **options)]
                    names = [str(dataset[row]["id"]) for row in chosen]
                    numbers = [vector.float().numpy() for vector in vectors]
                    check_finite(numbers, names, f"{task_metadata.name}, {prompt_type}")
                    found |= dict(zip(chosen, vectors, strict=True))
                    bar.update(len(chosen))
        return [found[row] for row in range(len(dataset))]


def media_first(
    wrapper: SentenceTransformerEncoderWrapper | MultiVectorWrapper,
    store: EmbeddingStore,
    instructed: Collection[PromptType] = (),
) -> MediaFirstEncoder | MediaFirstMultiVector:
    """The encoder of our own suites for a model of either kind; arguments as of `MediaFirstEncoder`."""
    if isinstance(wrapper, MultiVectorWrapper):
        return MediaFirstMultiVector(wrapper, instructed)
    return MediaFirstEncoder(wrapper, store, instructed)


def own_prompt(
    wrapper: SentenceTransformerEncoderWrapper | MultiVectorWrapper, task_metadata: Any, prompt_type: PromptType | None
) -> str | None:
    """A model's own prompt for a side of a task, `None` where it names none."""
    prompts = wrapper.model_prompts
    return prompts.get(get_prompt_name(prompts, task_metadata, prompt_type) or "") if prompts else None


def _by_prompt(dataset: Dataset, prompt: str | None) -> Iterator[tuple[str | None, list[int]]]:
    """Rows with the prompt they share: an instruction of their own stands behind the model's prompt, if that stays."""
    told = dataset[PROMPT_COLUMN] if PROMPT_COLUMN in dataset.column_names else [""] * len(dataset)
    for instruction in sorted(set(told)):
        rows = [row for row, own in enumerate(told) if own == instruction]
        yield f"{prompt or ''}{instruction}" if instruction else prompt, rows


def _undecoded(dataset: Dataset) -> Dataset:
    """The data set with media as stored: image bytes or paths, frame paths."""
    plain = dataset.with_format(None)
    return plain.cast_column("image", Image(decode=False)) if "image" in plain.column_names else plain


def _text(record: dict[str, Any]) -> str:
    return record.get("body") or record.get("text") or ""  # mteb keeps the unstripped text of a document as `body`


def _content(record: dict[str, Any], digests: dict[str, bytes]) -> bytes:
    """A hash of everything the model sees of a row; `digests` remembers the files already read."""
    image = record.get("image")
    sources = [image.get("bytes") or image["path"]] if image else []
    media = []
    for source in [*sources, *(record.get("video") or ())]:
        if isinstance(source, bytes):
            media.append(content_key(source))
            continue
        if source not in digests:
            digests[source] = content_key(Path(source).read_bytes())
        media.append(digests[source])
    return content_key(str(len(sources)), _text(record), *media)


def as_input(record: dict[str, Any]) -> dict[str, Any] | str:
    """A row as SentenceTransformer input: `{"image": ..., "text": ...}` in that order, absent parts left out."""
    inputs: dict[str, Any] = {}
    if record.get("image"):
        inputs["image"] = read_image(record["image"].get("bytes") or record["image"]["path"])
    if record.get("video"):
        inputs["video"] = StoredFrames(tuple(record["video"])).as_video()
    if not inputs:
        return _text(record)
    if _text(record).strip():
        inputs["text"] = _text(record)
    return inputs
