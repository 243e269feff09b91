"""Weights that can't hold their own updates: training in half precision without a float32 copy is warned about."""

from __future__ import annotations

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
# What DeepSpeed leaves on parameters whose float32 copy it updates (ZeRO 1 and 2; ZeRO 3).
_MASTER_COPY = ("_hp_mapping", "ds_id")


def half_precision_warning(model: nn.Module) -> str | None:
    """Why training this model as it is loses updates, with the remedy.

    A bfloat16 weight keeps 8 bits: an update of less than 1/512 of the weight is rounded away, which most are at
    learning rates below 1e-4. In float16 AdamW's epsilon (1e-8) and its mean of small squared gradients are 0, and its
    step divides by them.

    Args:
        model: The model, wrapped or not.

    Returns:
        The message; None if no weight that trains is half-precision, or the optimizer updates a float32 copy of them.
    """
    found: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        half = parameter.requires_grad and parameter.dtype in HALF
        if half and not any(hasattr(parameter, mark) for mark in _MASTER_COPY):
            found[parameter.dtype] = found.get(parameter.dtype, 0) + parameter.numel()
    if not found:
        return None
    kinds = " and ".join(f"{count:,} in {str(dtype).removeprefix('torch.')}" for dtype, count in found.items())
    return (
        f"half-precision weights are trained ({kinds}): small updates round to nothing in bfloat16, and AdamW gives "
        'NaN in float16. Build with model_kwargs={"dtype": "float32"} and train under autocast (bf16=True in the '
        "training arguments). To keep a frozen base in half precision, make only what trains float32: "
        "for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data"
    )


def warn_of_half_precision(model: nn.Module) -> None:
    """Log `half_precision_warning`, if there is one.

    Args:
        model: The model, wrapped or not.
    """
    if message := half_precision_warning(model):
        logger.warning("%s", message)
