"""LoRA and DoRA on the language model, with the K token embeddings of the BToks; and back to stock weights.

The adapter is peft's, added with sentence-transformers' own `model.add_adapter(btok_lora_config(model))`. What a save
then writes is the adapter alone, which refers to its base model by name. That loads as the trained model only if that
base can be loaded again with as many embedding rows and the same weights; `base_gap` reads it again and says what is
missing. A model whose weights are not those of its origin any more gives up the origin's name (`CHANGED`), so that
an adapter of it can't be loaded over the wrong base. `merge_adapters` makes plain stock weights of everything, which
always load.

An adapter's checkpoint also keeps a fingerprint of its base, among the arguments of the chat template in
`processing_kwargs` (templates skip what they don't know): `base_change` compares it with the base as it is now.

DoRA's magnitude vectors need one more thing: peft (0.21) writes them under a key that transformers (5.23) does not
read back, so they would silently be lost. The key with `.weight` behind it is read by both (`keep_magnitudes`).
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from st_btok.model_parts import (
    checkpoint_tensors,
    commit_of,
    embedding_matrix,
    find_btoks,
    forget_adapters,
    tokenizer_of,
    without_adapter,
)

logger = logging.getLogger(__name__)

# What stands for the origin of a model whose weights are its own: it can't be loaded, and the error quotes it.
CHANGED = "(weights changed in memory: pass base= to btok_lora_config)"
FINGERPRINT = "base_fingerprint"
_MENTION = f"{{% set _ = {FINGERPRINT} %}}"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


def btok_lora_config(
    model: SentenceTransformer,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    use_dora: bool = False,
    *,
    base: str | Path | None = None,
    **lora: Any,
) -> LoraConfig:
    """A peft config for `model.add_adapter`: LoRA on every linear layer of the language model, and the BToks.

    Vision and audio towers and their projectors stay as they are. Defaults are the authors' (r 16, alpha 32, dropout
    0.05), who also set `use_dora=True`.

    Args:
        model: A BTok model without adapters.
        r: Rank, at least 1. Default 16.
        alpha: Scale; the update is alpha / r times the product. Default 32.
        dropout: Dropout on the adapter's input, in [0, 1). Default 0.05.
        use_dora: DoRA: also train each output feature's magnitude. The model is then taught to save it under a key
            that loading finds. Default False.
        base: A folder to save the model to as it is now; adapter checkpoints will refer to it by its absolute path.
            A folder that holds another model's base is refused: adapters may stand on it. Needed for loading and
            resuming them where the backbone's own checkpoint lacks something (a logged warning
            says so): rows for the BToks, a place to load it from, or weights that were trained or merged since.
            Default None: they refer to where the backbone came from, which is read once more to compare.
        **lora: Further arguments of `peft.LoraConfig`, such as `use_rslora`. `target_modules` replaces the choice
            made here; `trainable_token_indices`, a list or a dict of them, adds tokens to the BToks (None: no token
            embedding is trained, the BToks' neither).

    Returns:
        The config.

    Raises:
        ValueError: If the model has no BToks, has an adapter already, `base` holds another model, or an argument is
            out of range.
    """
    transformer, ids = find_btoks(model)
    if r < 1 or not 0 <= dropout < 1:
        raise ValueError(f"r must be at least 1 and dropout in [0, 1), got r={r} and dropout={dropout}.")
    if getattr(transformer.model, "peft_config", None):
        raise ValueError(
            "the model has an adapter already. Call merge_adapters(model) first, or train the one it has."
        )
    _refer_to_base(model, base)
    transformer.model.register_load_state_dict_pre_hook(partial(_keep_base_rows, ids))
    if use_dora:
        _write_magnitudes(transformer.model)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        **{
            "target_modules": language_model_linears(transformer.model),
            **lora,
            "trainable_token_indices": _with_btoks(transformer.model, lora.get("trainable_token_indices", []), ids),
        },
    )


def _refer_to_base(model: SentenceTransformer, base: str | Path | None) -> None:
    """Name the base that an adapter's checkpoints will refer to, with its fingerprint; or warn that there is none."""
    transformer, _ = find_btoks(model)
    backbone = transformer.model
    if base is not None:
        folder = Path(base).resolve()
        _set_fingerprint(transformer, None)
        _save_base(model, folder)
        backbone.name_or_path = str(folder)
    elif gap := base_gap(model):
        if _origin_config(backbone) is not None:
            backbone.name_or_path = CHANGED
        logger.warning(
            "Checkpoints of this adapter can't be loaded or resumed: %s. Pass btok_lora_config(model, "
            'base="a folder"), or save nothing before merge_adapters(model).',
            gap,
        )
        return
    origin = str(backbone.name_or_path)
    if Path(origin).is_dir():  # a relative path would lead elsewhere from another working directory
        backbone.name_or_path = origin = str(Path(origin).resolve())
    _set_fingerprint(transformer, base_fingerprint(origin))


def _save_base(model: SentenceTransformer, folder: Path) -> None:
    """Save a base to a folder, unless another one lies there: adapters that were trained on that would change."""
    if not (folder / "config.json").exists():
        model.save_pretrained(str(folder))
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as new:
        model.save_pretrained(new)
        if _weights_hash(Path(new)) != _weights_hash(folder):
            raise ValueError(
                f"base must be a folder of its own, but {folder} holds another model, on which adapters may stand: "
                "they would load with other vectors. Pass another folder, or remove that one."
            )


def _keep_base_rows(ids: list[int], backbone: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: an adapted model keeps the base rows of its BToks.

    A checkpoint of an adapter is loaded on the backbone as it was published, whose rows there hold anything. The
    embeddings come from the adapter's rows; but a tied LM head reads the base's, so that the losses after resuming, or
    after `load_best_model_at_end`, would be other ones.
    """
    if not getattr(backbone, "peft_config", None):
        return
    own = embedding_matrix(backbone)
    name = next((name for name, parameter in backbone.named_parameters() if parameter is own), None)
    loaded = state_dict.get(f"{prefix}{name}")
    if loaded is not None and loaded.shape == own.shape:
        loaded = loaded.clone()
        loaded[ids] = own.detach()[ids].to(loaded)
        state_dict[f"{prefix}{name}"] = loaded


def _with_btoks(
    backbone: PreTrainedModel, given: list[int] | dict[str, list[int]] | None, ids: list[int]
) -> list[int] | dict[str, list[int]] | None:
    """The tokens whose rows train: those asked for and the BToks, whose rows an adapter must never lose."""
    if given is None:
        return None
    if not isinstance(given, dict):
        return [*ids, *(token for token in given if token not in ids)]
    matrix = backbone.get_input_embeddings()
    name = next(name for name, module in backbone.named_modules() if module is matrix)
    key = next((key for key in given if f".{name}".endswith(f".{key}")), name.rpartition(".")[2])
    return {**given, key: [*ids, *(token for token in given.get(key, []) if token not in ids)]}


def language_model_linears(model: PreTrainedModel) -> str:
    """A regular expression for the names of all linear layers inside the language model, for peft's `target_modules`.

    Of a recurrent mixer (Mamba, gated delta net: it owns `A_log`) only the input projections: fused kernels read its
    other weights directly, past any adapter, and peft refuses some of them.

    Args:
        model: The backbone, of any family; its decoder is found by structure.

    Returns:
        The expression, to be matched against full module names.

    Raises:
        ValueError: If the language model has no linear layers.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    towers, mixers, found = [], set(), []
    for name, module in decoder.named_modules():  # outer modules come before what they hold
        # Some multimodal models are their own decoder: the models inside them (vision, audio) keep their layers.
        if name and isinstance(module, PreTrainedModel):
            towers.append(f"{name}.")
        if hasattr(module, "A_log"):
            mixers.add(name)
        if not isinstance(module, nn.Linear | Conv1D) or name.startswith(tuple(towers)):
            continue
        parent, _, own = name.rpartition(".")
        if parent not in mixers or own.startswith("in_proj"):
            found.append(name)
    if not found:
        raise ValueError(f"{type(decoder).__name__} has no linear layers to adapt. Pass target_modules=...")
    # One alternative for each kind of layer, not for each layer: `layers.0.mlp.up` stands for all of its depth.
    parts = sorted({re.sub(r"\.\d+\.", r".N.", f".{name}") for name in found})
    pattern = "|".join(re.escape(part[1:]).replace(r"\.N\.", r"\.\d+\.") for part in parts)
    return f"{re.escape(prefix) + re.escape('.') if prefix else ''}(?:{pattern})"


def merge_adapters(model: SentenceTransformer) -> SentenceTransformer:
    """Write all adapters and the trained BToks into the weights they adapt, in place; what is left is stock.

    Embeddings stay equal up to the rounding of the weights' own type: 1e-6 in float32, visibly less in bfloat16 (call
    `model.float()` first, or keep the adapter). The merged weights are frozen as the base was: call
    `model.requires_grad_(True)` to train them on.

    Args:
        model: A model with adapters. One without is returned as it is.

    Returns:
        The same model.
    """
    transformer, _ = find_btoks(model)
    backbone = transformer.model
    if not getattr(backbone, "peft_config", None):
        return model
    for name, module in list(_outermost_adapters(backbone)):
        if isinstance(module, AuxiliaryTrainingWrapper):  # the trained token embeddings, which are no layer of LoRA's
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, plain)
    # What is left must look as if there had never been an adapter, or saving would write an adapter's file.
    forget_adapters(backbone)
    backbone.__dict__.pop("get_adapter_state_dict", None)
    backbone.name_or_path = CHANGED
    _set_fingerprint(transformer, None)
    return model


def save_trained(model: SentenceTransformer, path: str | Path) -> str:
    """Save a trained model in the smallest form that a plain `SentenceTransformer(path)` loads with equal embeddings.

    Without adapters: its weights. With adapters whose base can be loaded again as it was: the adapters alone. Else the
    adapters are merged first, which changes the model in memory too (`merge_adapters`).

    Args:
        model: The model.
        path: Folder to write.

    Returns:
        What was written and why, which is also logged.
    """
    backbone = find_btoks(model)[0].model
    if not getattr(backbone, "peft_config", None):
        report = "all weights, because the model has no adapters"
    elif gap := base_gap(model):
        merge_adapters(model)
        report = f"all weights with the adapters merged, because {gap}"
    else:
        keep_magnitudes(backbone)
        report = f"the adapters alone, because their base {backbone.name_or_path!r} can be loaded as it was"
    model.save_pretrained(str(path))
    logger.info("Wrote to %s: %s.", path, report)
    return report


def base_gap(model: SentenceTransformer) -> str | None:
    """Why an adapter checkpoint that refers to the backbone's origin would not load as the model; None if it would.

    Checked are the place, the size of the embedding matrix, who holds the embeddings of the BToks (a model without
    adapters is taken for one that will train them), and every weight that no adapter replaces: the origin is read once
    more, in parts. Quantised weights are taken for those of the origin.
    """
    transformer, ids = find_btoks(model)
    backbone = transformer.model
    origin, config = backbone.name_or_path or "", _origin_config(backbone)
    if config is None:
        made = "were adapters merged into it?" if origin == CHANGED else "was it built from a model in memory?"
        return f"their base can't be loaded again from {origin!r} ({made})"
    if type(config) is not type(backbone.config):
        return f"their base {origin!r} is a {config.model_type} model, the adapted one a part of it"
    rows, stored = len(embedding_matrix(backbone)), config.get_text_config(decoder=True).vocab_size
    if rows != stored:
        return f"their base {origin!r} has {stored} embedding rows, the model with its bottleneck tokens has {rows}"
    held = _held_rows(backbone) or [set(ids)]
    if not all(rows >= set(ids) for rows in held) and not Path(origin, "modules.json").exists():
        return f"they don't hold the rows of the bottleneck tokens, and neither does their base {origin!r}"
    if name := _changed_weight(backbone, origin, set.intersection(*held)):
        return f"the model's weights are no longer those of their base {origin!r} ({name} differs)"
    return None


def _origin_config(backbone: PreTrainedModel) -> PreTrainedConfig | None:
    """The config in the place that the backbone came from; None where there is no such place any more."""
    try:
        return AutoConfig.from_pretrained(backbone.name_or_path) if backbone.name_or_path else None
    except (OSError, ValueError, HFValidationError):
        return None


def _held_rows(backbone: PreTrainedModel) -> list[set[int]]:
    """The tokens whose rows each adapter of the model holds."""
    given = [adapter.trainable_token_indices or [] for adapter in getattr(backbone, "peft_config", {}).values()]
    return [set(chain.from_iterable(one.values())) if isinstance(one, dict) else set(one) for one in given]


def warn_of_lost_btoks(model: SentenceTransformer) -> None:
    """Say, before a training, that saves of an adapter that is not from `btok_lora_config` lose the BToks."""
    transformer, ids = find_btoks(model)
    origin = str(transformer.model.name_or_path)
    if all(rows >= set(ids) for rows in _held_rows(transformer.model)) or Path(origin, "modules.json").exists():
        return
    logger.warning(
        "What this adapter saves will load with other vectors: it holds no token embeddings of the bottleneck tokens, "
        "and neither does its base %r. Add it with model.add_adapter(btok_lora_config(model)), or save only after "
        "merge_adapters(model).",
        origin,
    )


def _changed_weight(backbone: PreTrainedModel, origin: str, held: set[int]) -> str | None:
    """Name of a weight that differs from the origin's, but for the rows of the embedding matrix that adapters hold."""
    if getattr(backbone, "hf_quantizer", None) is not None:
        return None
    matrix = embedding_matrix(backbone)
    for name, stored in checkpoint_tensors(type(backbone), origin):
        own = without_adapter(backbone, name)
        if own.shape != stored.shape or own.is_meta or not own.is_floating_point():
            continue  # sharded, offloaded or packed
        # Both in the type of fewer bits: a model may have been loaded in another one than the checkpoint's.
        kind = min(own.dtype, stored.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        found, expected = own.detach().to("cpu", kind), stored.to(kind)
        if own is matrix and held:
            kept = torch.ones(len(found), dtype=torch.bool)
            kept[sorted(held)] = False
            found, expected = found[kept], expected[kept]
        if not torch.equal(found, expected):
            return name
    return None


def base_fingerprint(origin: str) -> str:
    """A text that changes with an adapter's base: a hash of weights and config, or a commit of the hub.

    `"sha256:..."` for a folder, `"commit:..."` for a name on the hub.
    """
    folder = Path(origin)
    return f"sha256:{_weights_hash(folder, 'config.json')}" if folder.is_dir() else f"commit:{commit_of(origin)}"


def _weights_hash(folder: Path, *others: str) -> str:
    """Of all weight files in a folder, and of other files by name."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS or path.name in others:
            with path.open("rb") as file:
                whole.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def base_change(model: SentenceTransformer) -> str | None:
    """Why a loaded adapter does not stand on the base that it was trained on, and what to do.

    None if it does, or if its checkpoint keeps no fingerprint.
    """
    transformer, _ = find_btoks(model)
    kept: Any = transformer.processing_kwargs.get("chat_template", {}).get(FINGERPRINT)
    if not kept or not getattr(transformer.model, "peft_config", None):
        return None
    origin = str(transformer.model.name_or_path)
    if base_fingerprint(origin) == kept:
        return None
    return (
        f"the adapter's base {origin!r} is not the one that the adapter was trained on: its weights or config were "
        "overwritten since. Put the old base back, or train again"
    )


def _set_fingerprint(transformer: Transformer, fingerprint: str | None) -> None:
    """Write it where every save of the model writes it down; None takes it out.

    It stands among the chat template's arguments. The template mentions it without using it: transformers takes an
    argument that the template does not know for one of the processor (5.20 then drops padding, later ones warn).
    """
    kept: Any = dict(transformer.processing_kwargs)
    template = {name: value for name, value in kept.get("chat_template", {}).items() if name != FINGERPRINT}
    kept["chat_template"] = {**template, FINGERPRINT: fingerprint} if fingerprint else template
    if isinstance(text := template.get("chat_template"), str):
        kept["chat_template"]["chat_template"] = _mentioned(text, fingerprint)
    transformer.processing_kwargs = kept
    for holder in (transformer.processor, tokenizer_of(transformer)):
        if isinstance(text := getattr(holder, "chat_template", None), str):
            holder.chat_template = _mentioned(text, fingerprint)


def _mentioned(template: str, fingerprint: str | None) -> str:
    """The template with the fingerprint's name in it, or without; it renders the same text."""
    plain = template.removeprefix(_MENTION)
    return _MENTION + plain if fingerprint else plain


def _outermost_adapters(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted modules by name, without those inside of another adapted module."""
    seen: list[str] = []
    for name, module in backbone.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
            if not any(name.startswith(f"{outer}.") for outer in seen):
                seen.append(name)
                yield name, module


def keep_magnitudes(backbone: PreTrainedModel) -> None:
    """Before a model with a loaded DoRA adapter is saved or trained on: its saves name the magnitudes readably."""
    if any(adapter.use_dora for adapter in getattr(backbone, "peft_config", {}).values()):
        _write_magnitudes(backbone)


def _write_magnitudes(backbone: PreTrainedModel) -> None:
    """Have this model's adapter saves name DoRA's magnitudes as loading expects them."""

    def get_adapter_state_dict(self: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = type(self).get_adapter_state_dict(self, *args, **kwargs)
        return {f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: state[key] for key in state}

    # On the instance, as a bound method: a deep copy of the model then binds it to the copy.
    backbone.__dict__["get_adapter_state_dict"] = MethodType(get_adapter_state_dict, backbone)
