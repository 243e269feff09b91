"""The proof that nothing leaks past the BToks: a target must depend on the input through them alone."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn

from st_btok.anatomy import tokenizer_of
from st_btok.training.attention import BTOK, INPUT, TARGET, condensation_attention
from st_btok.training.targets import JointBatch, join_targets


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


def probe_batch(transformer: Transformer, btoks: list[int], end: int) -> JointBatch:
    """One joint row to measure a backbone with: an image where it takes images, text, and a short target.

    Args:
        transformer: The model's first module.
        btoks: The K token ids.
        end: Id of the end-of-turn token.

    Returns:
        The row, on the backbone's device.
    """
    sample: Any = {"text": "1 2 3 4"}
    if "image" in transformer.modality_config:
        sample["image"] = Image.new("RGB", (56, 56), "red")
    unlimited: Any = {"chat_template": {"max_chars": None}}
    features = transformer.preprocess([sample], processing_kwargs=unlimited)
    text = tokenizer_of(transformer)("5 6 7", add_special_tokens=False)["input_ids"]
    device = transformer.model.device
    features = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}
    return join_targets(features, [torch.tensor([*text, end])], btoks)
