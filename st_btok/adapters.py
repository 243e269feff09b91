"""LoRA and DoRA on the language model, with the K bottleneck rows trained beside them; and back to stock weights.

The adapter is peft's, added with sentence-transformers' own `model.add_adapter(btok_lora_config(model))`. What a save
then writes is the adapter alone, which refers to its base model by name. That loads as the trained model only if that
base can be loaded again with as many embedding rows and the same weights; `base_gap` says what is missing.
`merge_adapters` makes plain stock weights of everything, which always load.

DoRA's magnitude vectors need one more thing: peft (0.21) writes them under a key that transformers (5.23) does not
read back, so they would silently be lost. The key with `.weight` behind it is read by both (`_write_readable_keys`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

from huggingface_hub.errors import HFValidationError
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from st_btok.model_parts import embedding_matrix, find_btoks

logger = logging.getLogger(__name__)


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
    """A peft config for `model.add_adapter`: LoRA on every linear layer of the language model, and the K BTok rows.

    Vision and audio towers and their projectors stay as they are. Defaults are the authors' (r 16, alpha 32, dropout
    0.05), who also set `use_dora=True`.

    Args:
        model: A BTok model without adapters.
        r: Rank, at least 1. Default 16.
        alpha: Scale; the update is alpha / r times the product. Default 32.
        dropout: Dropout on the adapter's input, in [0, 1). Default 0.05.
        use_dora: DoRA: also train each output feature's magnitude. The model is then taught to save it under a key
            that loading finds. Default False.
        base: A folder to save the model to as it is now; adapter checkpoints will refer to it. Needed for loading and
            resuming them where the backbone's own checkpoint lacks something (a logged warning says so): rows for the
            BToks, or a place to load it from. Default None: they refer to where the backbone came from.
        **lora: Further arguments of `peft.LoraConfig`, such as `use_rslora`; `target_modules` and
            `trainable_token_indices` replace the choices made here.

    Returns:
        The config.

    Raises:
        ValueError: If the model has no BToks, has an adapter already, or an argument is out of range.
    """
    transformer, ids = find_btoks(model)
    if r < 1 or not 0 <= dropout < 1:
        raise ValueError(f"r must be at least 1 and dropout in [0, 1), got r={r} and dropout={dropout}.")
    if getattr(transformer.model, "peft_config", None):
        raise ValueError(
            "the model has an adapter already. Call merge_adapters(model) first, or train the one it has."
        )
    if base is not None:
        model.save_pretrained(str(base))
        transformer.model.name_or_path = transformer.model.config.name_or_path = str(base)
    elif gap := base_gap(transformer.model):
        logger.warning(
            "Checkpoints of this adapter can't be loaded or resumed: %s. Pass btok_lora_config(model, "
            'base="a folder"), or save nothing before merge_adapters(model).',
            gap,
        )
    if use_dora:
        _write_readable_keys(transformer.model)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        **{
            "target_modules": language_model_linears(transformer.model),
            "trainable_token_indices": ids,
            **lora,
        },
    )


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
    """Write all adapters and trained BTok rows into the weights they adapt, in place; what is left is stock.

    Embeddings stay equal up to the rounding of the weights' own type: 1e-6 in float32, visibly less in bfloat16 (call
    `model.float()` first, or keep the adapter). The merged weights are frozen as the base was: call
    `model.requires_grad_(True)` to train them on.

    Args:
        model: A model with adapters. One without is returned as it is.

    Returns:
        The same model.
    """
    backbone = find_btoks(model)[0].model
    if not getattr(backbone, "peft_config", None):
        return model
    for name, module in list(_outermost_adapters(backbone)):
        if isinstance(module, AuxiliaryTrainingWrapper):  # the trained BTok rows, which are no layer of LoRA's
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, plain)
    # What is left must look as if there had never been an adapter, or saving would write an adapter's file.
    del backbone.peft_config
    backbone._hf_peft_config_loaded = False
    backbone.__dict__.pop("get_adapter_state_dict", None)
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
    elif gap := base_gap(backbone):
        merge_adapters(model)
        report = f"all weights with the adapters merged, because {gap}"
    else:
        report = f"the adapters alone, because their base {backbone.name_or_path!r} can be loaded as it was"
    model.save_pretrained(str(path))
    logger.info("Wrote to %s: %s.", path, report)
    return report


def base_gap(backbone: PreTrainedModel) -> str | None:
    """Why an adapter checkpoint that refers to the backbone's origin would not load as the model in memory.

    Checked are the place, the size of the embedding matrix and who holds the BTok rows. The frozen weights are taken
    for those of the origin: a model whose weights were trained in memory before it got its adapter needs `base`.

    Args:
        backbone: The transformers model, with or without adapters. Without, one that trains the BTok rows is assumed.

    Returns:
        The reason; None if there is none.
    """
    origin = backbone.name_or_path or ""
    try:
        config = AutoConfig.from_pretrained(origin) if origin else None
    except (OSError, ValueError, HFValidationError):
        config = None
    if config is None:
        return f"their base can't be loaded again from {origin!r} (was it built from a model in memory?)"
    rows, stored = len(embedding_matrix(backbone)), config.get_text_config(decoder=True).vocab_size
    if rows != stored:
        return f"their base {origin!r} has {stored} embedding rows, the model with its bottleneck tokens has {rows}"
    configs = getattr(backbone, "peft_config", {}).values()
    if any(not config.trainable_token_indices for config in configs) and not Path(origin, "modules.json").exists():
        return f"they don't hold the rows of the bottleneck tokens, and neither does their base {origin!r}"
    return None


def _outermost_adapters(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted modules by name, without those inside of another adapted module."""
    seen: list[str] = []
    for name, module in backbone.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
            if not any(name.startswith(f"{outer}.") for outer in seen):
                seen.append(name)
                yield name, module


def _write_readable_keys(backbone: PreTrainedModel) -> None:
    """Have this model's adapter saves name DoRA's magnitudes as loading expects them."""

    def get_adapter_state_dict(self: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = type(self).get_adapter_state_dict(self, *args, **kwargs)
        return {f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: state[key] for key in state}

    # On the instance, as a bound method: a deep copy of the model then binds it to the copy.
    backbone.__dict__["get_adapter_state_dict"] = MethodType(get_adapter_state_dict, backbone)
