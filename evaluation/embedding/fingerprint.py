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
from sentence_transformers.base.model import BaseModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

_KNOWN: WeakKeyDictionary[torch.nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()

UNSTAMPED = "no_revision_available"
"""mteb's revision of a model that brings none."""

_NO_MATTER = frozenset(
    (
        "architectures auto_map auto_mapping base_model_name_or_path dtype inference_mode output_attentions "
        "output_hidden_states peft_version return_dict revision task_type torch_dtype transformers_version use_cache"
    ).split()
)
"""Keys of configurations that decide no embedding, or do so through the weights (`dtype`), which are hashed."""


def fingerprint(model: torch.nn.Module, *, truncation: bool = True) -> str:
    """Hash of a model's weights and of everything else that changes its embeddings.

    Beside the weights with their types these are, of a sentence-transformers model: the configuration of every
    transformers model and adapter in it, the tokenizer with its normalizer and vocabulary, the processors of media,
    the chat template, the modules' settings, prompts, lengths and truncation, and the similarity function.

    Args:
        model: Any torch module; one that isn't of sentence-transformers counts by its weights alone.
        truncation: Whether `truncate_dim` counts (default); without it, models that differ only in how much of an
            embedding they keep are equal.

    Returns:
        40 hexadecimal digits, the form of a hub commit. Equal for a saved and reloaded model on any device.
    """
    digest = hashlib.sha256(_weights(model).encode())
    if isinstance(model, BaseModel):
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


def _settings(model: BaseModel) -> dict[str, Any]:
    """Everything beside the weights that decides an embedding or a score, as the saved files of a model hold it."""
    processor = getattr(model, "processor", None) or getattr(model, "tokenizer", None)
    parts = {
        kind: getattr(processor, kind, None) for kind in ("image_processor", "video_processor", "feature_extractor")
    }
    if hasattr(processor, "image_mean"):  # a model of pictures alone has no more than its image processor
        parts["image_processor"] = processor
    return {
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "truncate_dim": getattr(model, "truncate_dim", None),
        "max_seq_length": model.max_seq_length,
        "similarity": getattr(model, "similarity_fn_name", None),
        "chat_template": getattr(processor, "chat_template", None),
        "media": {kind: _public(part) for kind, part in parts.items()},
        "processor": _plain(vars(processor)) if isinstance(processor, ProcessorMixin) else {},
        "tokenizer": _tokenizer(getattr(processor, "tokenizer", processor)),
        "modules": _module_settings(model),
        "configs": _configs(model),
    }


def _module_settings(model: BaseModel) -> dict[str, Any]:
    modules = {}
    for name, module in model.named_modules():
        read_config = getattr(module, "get_config_dict", None)
        if callable(read_config) and module is not model:
            config = cast("dict[str, Any]", read_config())
            modules[f"{name} {type(module).__name__}"] = {k: v for k, v in config.items() if "path" not in k}
    return modules


def _configs(model: torch.nn.Module) -> dict[str, Any]:
    """The transformers configurations (`rope_theta`, `rms_norm_eps`, `hidden_act`, windows) and those of adapters."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            # what differs from the architecture's defaults: a new release that adds a setting changes nothing
            found[name] = _without(config.to_diff_dict(), _NO_MATTER)
        adapters = getattr(module, "peft_config", None)
        if isinstance(adapters, dict) and id(adapters) not in seen:
            seen.add(id(adapters))
            settings = {key: _without(adapter.to_dict(), _NO_MATTER) for key, adapter in adapters.items()}
            found[f"{name} adapters"] = settings
        disabled = getattr(module, "disable_adapters", None)
        if isinstance(disabled, bool):  # of a layer with adapters; a model's attribute of that name is a method
            active = [] if disabled else module.active_adapters
            found |= {} if active == ["default"] else {f"{name} active": active}
    return found


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's files: vocabulary, merges, normalizer, special tokens; not what the last call left in it."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return {}
    # the padding side decides nothing: pooling reads either, and some processors turn it round when they are loaded
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        files: Any = [sorted(tokenizer.get_vocab().items()), _plain(tokenizer.init_kwargs)]
    else:
        written = (
            backend.to_str()
        )  # truncation and padding stand before the added tokens: the last call's, not a file's
        files = hashlib.sha256(written[written.index('"added_tokens"') :].encode()).hexdigest()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"truncation_side": tokenizer.truncation_side, "special": special, "files": files}


def _public(processor: Any) -> dict[str, Any]:
    """How media are prepared: sizes, normalisation, frame sampling."""
    return {} if processor is None else {key: value for key, value in processor.to_dict().items() if key[0] != "_"}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among an object's attributes."""
    kinds = (str, int, float, bool)
    return {k: v for k, v in values.items() if isinstance(v, kinds) and k[0] != "_" and "path" not in k}


def _without(config: Any, keys: frozenset[str]) -> Any:
    """A configuration, at any depth, without private keys and those given."""
    if isinstance(config, Mapping):
        return {k: _without(v, keys) for k, v in config.items() if str(k)[:1] != "_" and k not in keys}
    return sorted(map(str, config)) if isinstance(config, set | frozenset) else config


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
