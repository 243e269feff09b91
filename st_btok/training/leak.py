"""The proof that nothing leaks past the BToks, and the route that follows from it.

A target must depend on the input through the BToks alone. Whether a mask can do that is a property of the backbone's
code, so it is measured, on one row, when the loss is made.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from PIL import Image
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn

from st_btok.limits import UNLIMITED
from st_btok.model_parts import tokenizer_of
from st_btok.training.mask import BTOK, INPUT, TARGET, condensation_attention
from st_btok.training.routes import NLL_KEY, Route, condensed_forward
from st_btok.training.targets import JointBatch, join_targets

logger = logging.getLogger(__name__)


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
    features = transformer.preprocess([sample], processing_kwargs=UNLIMITED)
    text = tokenizer_of(transformer)("5 6 7", add_special_tokens=False)["input_ids"]
    device = transformer.model.device
    features = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}
    return join_targets(features, [torch.tensor([*text, end])], btoks)


def choose_route(
    transformer: Transformer, btoks: list[int], end: int, route: Route | Literal["auto"], head: Tensor | None
) -> tuple[Route, float | None]:
    """Measure whether the mask cuts the target off, and settle the route; the choice is logged.

    Args:
        transformer: The model's first module.
        btoks: The K token ids.
        end: Id of the end-of-turn token.
        route: What the user asked for; `"auto"` for the first that is right: attention, `kv` under flash attention,
            which takes no mask, else prefix.
        head: The loss' own LM head, if it has one.

    Returns:
        The route, and the leak; None where nothing was measured.

    Raises:
        ValueError: If the route that was asked for can't be had on this backbone.
    """
    backbone = type(transformer.model).__name__
    if route in ("kv", "prefix", "unmasked"):  # cut off by construction, or not meant to be
        probe = probe_batch(transformer, btoks, end)
        features = dict(probe.original)
        # Whether the backbone can run it shows here, not after the first batch.
        with torch.no_grad(), condensed_forward(transformer, features, [probe.labels.cpu()], btoks, route, head):
            transformer(features)
        return route, None
    leak, reason = None, "it has no SDPA attention"
    if getattr(transformer.model, "_supports_sdpa", True):
        leak = find_leak(transformer, probe_batch(transformer, btoks, end))
        reason = f"a gradient of {leak:.2g} passed around the mask, which must be 0"
    cut_off = leak == 0.0
    if route == "attention" and not cut_off:
        raise ValueError(
            f"the condensation mask must cut the target off from its input, but for {backbone} {reason}: "
            'recurrent or convolutional layers, or an attention that takes no mask? Use route="auto" or "prefix".'
        )
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in transformer.model.modules())
    chosen: Route = "attention"
    if not cut_off:
        chosen = "prefix"
    elif route == "auto" and _is_flash(transformer) and not checkpointing:  # checkpointing leaves no cache to read
        chosen, reason = "kv", "flash attention takes no mask"
    else:
        reason = "the leak probe is 0"
    logger.info("BTokLoss uses route=%r on %s: %s.", chosen, backbone, reason)
    return chosen, leak


def _is_flash(transformer: Transformer) -> bool:
    return "flash" in (transformer.model.config.get_text_config(decoder=True)._attn_implementation or "")


def kv_agrees(transformer: Transformer, btoks: list[int], end: int, head: Tensor | None) -> bool:
    """Whether the kv route runs on a backbone and gives the likelihood of the attention route.

    Args:
        transformer: The model's first module.
        btoks: The token ids that targets read.
        end: Id of the end-of-turn token.
        head: The loss' own LM head, if it has one.

    Returns:
        True where both agree on the probe row, up to the rounding of the weights' type.
    """
    if _is_flash(transformer):  # takes no mask, so there is no attention route to agree with
        return False
    probe = probe_batch(transformer, btoks, end)
    found = []
    training = transformer.training
    transformer.eval()
    try:
        for route in ("attention", "kv"):
            features = dict(probe.original)
            targets = [probe.labels.cpu()]
            with torch.no_grad(), condensed_forward(transformer, features, targets, btoks, route, head):
                found.append(transformer(features)[NLL_KEY].float())
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        logger.info("No kv route on %s: %s", type(transformer.model).__name__, error)
        return False
    finally:
        transformer.train(training)
    tolerance = 1e-4 if transformer.model.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(((found[0] - found[1]).abs() <= tolerance * found[0].abs()).all())
