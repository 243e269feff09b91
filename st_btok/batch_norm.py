"""Batch normalisation keeps its pretrained statistics, also while a model trains.

Towers with convolutions have such layers, FastVLM's for one. In training mode a picture's states would hang on the
other pictures of its batch, so that `CachedBTokLoss` would not equal `BTokLoss`, and every step would move the running
statistics: an adapter is saved without them, and the loaded model would see other pictures than the trained one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FROZEN = "statistics_are_frozen"


def freeze_batch_norm(model: nn.Module) -> None:
    """Have every batch normalisation of a model use its running statistics, whatever mode the model is in.

    Its weights train as before. `build_model` and the losses of this package call it; a baseline that is trained with
    another loss needs it too.

    Args:
        model: The model, changed in place. A second call changes nothing.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and not hasattr(module, _FROZEN):
            module.register_forward_pre_hook(_evaluate)
            setattr(module, _FROZEN, True)


def _evaluate(module: nn.Module, _: Any) -> None:
    module.eval()
