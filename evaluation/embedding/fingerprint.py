"""The identity of a checkpoint: a hash of what decides its embeddings.

Results are stored under it as the model's revision, so a changed checkpoint never meets an old result, whatever its
name or folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from sentence_transformers import SentenceTransformer

_KNOWN: WeakKeyDictionary[torch.nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()

UNSTAMPED = "no_revision_available"
"""mteb's revision of a model that brings none."""


def fingerprint(model: torch.nn.Module, *, truncation: bool = True) -> str:
    """Hash of a model's weights and of the settings that change its embeddings.

    Args:
        model: Any torch module; of a SentenceTransformer the prompts, truncation, chat template and module settings
            count as well.
        truncation: Whether `truncate_dim` counts (default); without it, models that differ only in how much of an
            embedding they keep are equal.

    Returns:
        40 hexadecimal digits, the form of a hub commit. Equal for a saved and reloaded model on any device.
    """
    digest = hashlib.sha256(_weights(model).encode())
    if isinstance(model, SentenceTransformer):
        settings = _settings(model)
        if not truncation:
            settings["truncate_dim"] = None
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:40]


def checkpoint(model: torch.nn.Module, experiment: Mapping[str, Any] | None) -> str:
    """The fingerprint to store results under; that of the whole embedding where a variant names its truncation."""
    return fingerprint(model, truncation="truncate_dim" not in (experiment or {}))


def _weights(model: torch.nn.Module) -> str:
    """Hash of all weights; remembered per model object, because 78 tasks ask and a large model takes seconds.

    A remembered hash is used only while no tensor was replaced or written to; writes through `tensor.data` escape
    torch's counter, so a sample of every tensor's numbers is compared as well.
    """
    tensors = sorted((n, t.detach()) for n, t in model.state_dict(keep_vars=True).items() if torch.is_tensor(t))
    state = [(n, t.data_ptr(), t._version, _bytes(t.reshape(-1)[:: 1 + t.numel() // 64])) for n, t in tensors]
    known = _KNOWN.get(model)
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    _KNOWN[model] = state, digest.hexdigest()
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _settings(model: SentenceTransformer) -> dict[str, Any]:
    modules = {}
    for position, module in enumerate(model.children()):
        read_config = getattr(module, "get_config_dict", dict)
        config = cast("dict[str, Any]", read_config())
        modules[f"{position} {type(module).__name__}"] = {k: v for k, v in config.items() if "path" not in k}
    processor = getattr(model, "processor", None) or getattr(model, "tokenizer", None)
    return {
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "truncate_dim": model.truncate_dim,
        "max_seq_length": model.max_seq_length,
        "chat_template": getattr(processor, "chat_template", None),
        "media": {kind: _public(getattr(processor, kind, None)) for kind in ("image_processor", "video_processor")},
        "modules": modules,
    }


def _public(processor: Any) -> dict[str, Any]:
    """How media are prepared: sizes, normalisation, frame sampling."""
    return {} if processor is None else {key: value for key, value in processor.to_dict().items() if key[0] != "_"}


def stamp(model: SentenceTransformer, name: str | None = None) -> SentenceTransformer:
    """Write the fingerprint, and a name if given, where mteb looks for them.

    Args:
        model: The model; changed in place (its model card data only).
        name: Name to store results under; default: the one it has.

    Returns:
        The same model.
    """
    model.model_card_data.base_model_revision = fingerprint(model)
    if name is not None:
        model.model_card_data.model_name = name
    return model
