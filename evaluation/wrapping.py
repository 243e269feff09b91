"""Any SentenceTransformer as `mteb.evaluate` needs it: with modalities, a fingerprint as revision, and a name.

mteb reads no modalities from a bare `SentenceTransformer(path)`: it takes the model for a text model and refuses every
task with pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sentence_transformers import SentenceTransformer

from evaluation.embedding.fingerprint import checkpoint

if TYPE_CHECKING:  # importing `evaluation` must not import mteb, which takes seconds
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper

MODALITIES = ("text", "image", "audio", "video")


def wrap(
    model: SentenceTransformer, name: str | None = None, *, experiment: Mapping[str, int] | None = None
) -> SentenceTransformerEncoderWrapper:
    """The model as `mteb.evaluate` takes it, with full metadata.

        mteb.evaluate(evaluation.wrap(model), mteb.get_benchmark("MIEB(lite)"))

    Args:
        model: The model.
        name: See `model_meta`.
        experiment: See `model_meta`; the model has to be set accordingly.

    Returns:
        mteb's wrapper.
    """
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapper = SentenceTransformerEncoderWrapper(model)
    wrapper.mteb_model_meta = model_meta(model, name, experiment=experiment)
    return wrapper


def model_meta(
    model: SentenceTransformer, name: str | None = None, *, experiment: Mapping[str, int] | None = None
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
    from mteb.models import SentenceTransformerEncoderWrapper

    parts: set[str] = set()
    for modality in model.modalities:
        parts.update((modality,) if isinstance(modality, str) else modality)
    name = _loaded_from(model) if name is None else name
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


def _loaded_from(model: SentenceTransformer) -> str:
    """`owner/name` of a model from the hub, the folder's own name of a saved one, `model` for one made in code."""
    backbone = model.transformers_model
    source = str(getattr(getattr(backbone, "config", None), "_name_or_path", "") or "")
    if not source or (Path(source).is_absolute() and not Path(source).exists()):  # made in code, from a gone folder
        return "model"
    return Path(source).resolve().name if Path(source).exists() else source
