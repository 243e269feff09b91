"""A model as `mteb.evaluate` needs it: with modalities, a fingerprint as revision, and a name.

mteb reads no modalities from a bare `SentenceTransformer(path)`: it takes the model for a text model and refuses every
task with pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from evaluation.embedding.fingerprint import checkpoint
from evaluation.finite import check_finite
from evaluation.media import as_rgb
from evaluation.sum_of_parts import joined

if TYPE_CHECKING:  # importing `evaluation` must not import mteb, which takes seconds
    from mteb.models import ModelMeta, MultiVectorWrapper, SentenceTransformerEncoderWrapper

MODALITIES = ("text", "image", "audio", "video")
MEDIA = ("image", "video", "audio")


def wrap(
    model: SentenceTransformer | MultiVectorEncoder,
    name: str | None = None,
    *,
    experiment: Mapping[str, int] | None = None,
) -> SentenceTransformerEncoderWrapper | MultiVectorWrapper:
    """The model as `mteb.evaluate` takes it, with full metadata.

        mteb.evaluate(evaluation.wrap(model), mteb.get_benchmark("MIEB(lite)"))

    Media stand before the text in every input, and an embedding that isn't finite is an error, as in our own suites.

    Args:
        model: The model. One that embeds texts and pictures, but never both at once (CLIP), adds up the parts of an
            input; see `sum_of_parts`. One with many vectors per input is scored by MaxSim, on retrieval tasks only.
        name: See `model_meta`.
        experiment: See `model_meta`; the model has to be set accordingly.

    Returns:
        mteb's wrapper.
    """
    from mteb.models import MultiVectorWrapper, SentenceTransformerEncoderWrapper

    class CurrentMeta:
        """Metadata whose revision is that of the weights as they are now: mteb looks for stored results by it."""

        model: SentenceTransformer | MultiVectorEncoder

        @property
        def mteb_model_meta(self) -> ModelMeta:
            found: ModelMeta = vars(self)["meta"]
            # in place and past pydantic's setter: mteb stores the result under the very object it already holds
            vars(found)["revision"] = checkpoint(self.model, found.experiment_kwargs)
            return found

        @mteb_model_meta.setter
        def mteb_model_meta(self, value: ModelMeta) -> None:
            vars(self)["meta"] = value

    class MediaFirstWrapper(CurrentMeta, SentenceTransformerEncoderWrapper):  # type: ignore[misc]  # a field there
        """mteb's wrapper, which gives each row's columns in the order of the table, media before the text."""

        def encode(self, inputs: Any, **kwargs: Any) -> Any:
            vectors = super().encode(cast(Any, MediaFirstLoader(inputs)), **kwargs)
            _check(np.asarray(vectors), inputs.dataset, kwargs)
            return vectors

    class MediaFirstMultiVectorWrapper(CurrentMeta, MultiVectorWrapper):  # type: ignore[misc]  # as above
        """The same for a model with many vectors per input."""

        def _encode(self, inputs: Any, **kwargs: Any) -> Any:
            vectors = super()._encode(cast(Any, MediaFirstLoader(inputs)), **kwargs)
            _check([vector.float().numpy() for vector in cast("list[Any]", vectors)], inputs.dataset, kwargs)
            return vectors

    wrapper: SentenceTransformerEncoderWrapper | MultiVectorWrapper
    with quiet():
        if isinstance(model, MultiVectorEncoder):
            wrapper = MediaFirstMultiVectorWrapper(model)
        else:
            wrapper = MediaFirstWrapper(joined(model))
    wrapper.mteb_model_meta = model_meta(wrapper.model, name or _loaded_from(model), experiment=experiment)
    return wrapper


def _check(vectors: Any, dataset: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what isn't finite, by the ids of a table that has them."""
    ids = dataset["id"] if "id" in (getattr(dataset, "column_names", None) or ()) else range(len(vectors))
    side = kwargs.get("prompt_type") or "input"
    check_finite(vectors, list(map(str, ids)), f"{kwargs['task_metadata'].name}, {side}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without mteb's advice to give a model both prompts; a model has the prompts that it was trained with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SentenceTransformers that use prompts", UserWarning)
        yield


class MediaFirstLoader:
    """A data loader whose batches have their media before their text; it is the given one in all else.

    Args:
        loader: mteb's loader.
    """

    def __init__(self, loader: Any) -> None:
        object.__setattr__(self, "loader", loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Mteb sets the loader's collator."""
        setattr(self.loader, name, value)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches: column -> values."""
        for batch in self.loader:
            first = [name for name in MEDIA if name in batch]
            ordered = {name: batch[name] for name in [*first, *(name for name in batch if name not in first)]}
            if "image" in ordered:
                pictures = ordered["image"]
                ordered["image"] = [as_rgb(p) if isinstance(p, Image.Image) else p for p in pictures]
            yield ordered


def model_meta(
    model: SentenceTransformer | MultiVectorEncoder,
    name: str | None = None,
    *,
    experiment: Mapping[str, int] | None = None,
) -> ModelMeta:
    """Describe a model to mteb.

    Args:
        model: The model.
        name: Name to store and submit results under; one without an owner gets `local/`. Default: the name or the last
            folder that the model was loaded from, `model` where it was made in code.
        experiment: Settings that make this a variant of the checkpoint, such as `{"truncate_dim": 64}`: results are
            stored beside the checkpoint's own, as mteb's experiments.

    Returns:
        Metadata with name, fingerprint as revision, modalities, size, embedding size and prompts' use.
    """
    from mteb.models import MultiVectorWrapper, SentenceTransformerEncoderWrapper

    parts: set[str] = set()
    for modality in model.modalities:
        parts.update((modality,) if isinstance(modality, str) else modality)
    name = _loaded_from(model) if name is None else name
    with quiet():
        if isinstance(model, MultiVectorEncoder):
            meta = MultiVectorWrapper(model).mteb_model_meta
        else:
            meta = SentenceTransformerEncoderWrapper(model).mteb_model_meta
    return meta.model_copy(
        update={
            "name": name if "/" in name else f"local/{name}",
            "revision": checkpoint(model, experiment),
            "modalities": [modality for modality in MODALITIES if modality in parts],
            "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "embed_dim": model.get_embedding_dimension(),
            "use_instructions": any(model.prompts.values()),
            "open_weights": None,
            "experiment_kwargs": dict(experiment) if experiment else None,
        }
    )


def _loaded_from(model: SentenceTransformer | MultiVectorEncoder) -> str:
    """`owner/name` of a model from the hub, the folder's own name of a saved one, `model` for one made in code."""
    backbone = model.transformers_model
    source = str(getattr(getattr(backbone, "config", None), "_name_or_path", "") or "")
    if not source or (Path(source).is_absolute() and not Path(source).exists()):  # made in code, from a gone folder
        return "model"
    return Path(source).resolve().name if Path(source).exists() else source
