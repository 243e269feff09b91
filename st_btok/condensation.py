"""What the condensation term rests on: the LM head it needs, and the proof that nothing leaks past the BToks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from transformers import PreTrainedModel

from st_btok.adapters import embedding_matrix
from st_btok.attention import BTOK, INPUT, TARGET, condensation_attention
from st_btok.targets import JointBatch


def find_leak(transformer: Transformer, batch: JointBatch) -> float:
    """Largest influence of the input on the target's states once the BToks are cut off as well; must be exactly 0.

    The gradient of the target's last-layer states with respect to every input embedding and every pixel is taken with
    the target barred from input and BToks alike. Softmax gives a masked position the weight 0 exactly, so anything
    but 0 is a path that the mask does not cut: recurrent or convolutional layers, or an attention that ignores masks.

    Args:
        transformer: The model's first module, unwrapped.
        batch: Joint rows with at least one target token.

    Returns:
        The largest absolute gradient.
    """
    segments = torch.where(batch.segments == BTOK, INPUT, batch.segments)
    features = {
        key: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in batch.features.items()
    }
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Detached, so that weights stay out of it; input positions only, the target may depend on itself.
        leaf = output.detach().requires_grad_()
        embedded.append(leaf)
        return leaf

    training = transformer.training
    transformer.eval()
    handle = transformer.model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad(), condensation_attention(transformer.model, segments):
            states = transformer(features)["token_embeddings"]
            leaves = [*embedded, *(v for v in features.values() if isinstance(v, Tensor) and v.requires_grad)]
            leaves = [leaf for leaf in leaves if leaf is not states and leaf.is_leaf]
            grads = torch.autograd.grad(states[segments == TARGET].float().square().sum(), leaves, allow_unused=True)
    finally:
        handle.remove()
        transformer.train(training)
    leak = 0.0
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is None:
            continue
        if leaf.shape[:2] == segments.shape:  # token embeddings: look at input positions only
            grad = grad[segments == INPUT]
        if grad.numel():
            leak = max(leak, grad.abs().max().item())
    return leak


def output_embeddings(model: PreTrainedModel, lm_head: nn.Module | Tensor | str | None = None) -> Tensor:
    """The (V, D) matrix that turns last-layer states into logits.

    A BTok model holds the backbone without its LM head. With tied embeddings the input matrix is the head. An untied
    head (most 7B models) is read from the checkpoint the backbone came from, and stays out of the saved embedder.

    Args:
        model: The backbone inside the `Transformer` module.
        lm_head: An LM head (module or matrix) to use, or the name or path of a checkpoint to read it from. Default:
            the tied matrix, else the checkpoint in `model.config.name_or_path`.

    Returns:
        The matrix; the tied one is the live parameter.

    Raises:
        ValueError: If the head is not tied and can't be found.
    """
    if isinstance(lm_head, nn.Module):
        lm_head = lm_head.get_parameter("weight")
    if isinstance(lm_head, Tensor):
        return lm_head
    config = model.config
    embeddings = embedding_matrix(model)
    if lm_head is None and getattr(config, "tie_word_embeddings", False):
        return embeddings
    source = lm_head or config.name_or_path
    head = _read_lm_head(source) if source else None
    if head is None:
        raise ValueError(
            f"the backbone's LM head is not tied to its embeddings, and no lm_head.weight was found in {source!r}. "
            'Pass BTokLoss(..., lm_head="the backbone\'s name or path") or lm_head=full_model.lm_head.'
        )
    return head.to(device=embeddings.device, dtype=embeddings.dtype)


def _read_lm_head(source: str) -> Tensor | None:
    """Only the tensor `lm_head.weight` of a (sharded) safetensors checkpoint on disk or on the hub."""
    for name in ("model.safetensors.index.json", "model.safetensors"):
        path = _fetch(source, name)
        if path is None:
            continue
        if name.endswith(".json"):
            shard = _shard_of(path, "lm_head.weight")
            path = _fetch(source, shard) if shard else None
        if path is None:
            continue
        with safe_open(path, "pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor("lm_head.weight")
    return None


def _shard_of(index: Path, key: str) -> str | None:
    return json.loads(index.read_text())["weight_map"].get(key)


def _fetch(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.exists() else None
    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
