"""Why a variant does what it does: measured inside its training, on pairs that it does not train on.

* Conflict: the cosine of the two parts' gradients, and the size of the condensation loss' beside the ranking's. Near 0
  it neither helps nor hinders the ranking where it is measured; below 0 it is in the way.
* Information: nats per target token that the BToks' own content saves: the condensation loss on the right targets
  against that on another row's. What passes the bottleneck can't be more than what is needed to tell the
  rows apart, so 0 says that the decoder ignores the BToks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback


class Conflict(TrainerCallback):
    """Measures the gradients of both parts before certain steps.

    Args:
        loss: The loss in training, a `BTokLoss`.
        columns: Inputs of the two columns.
        steps: Steps before which to measure.

    Attributes:
        found: By step: `cosine`, and `ratio` of the norms, the weighted condensation loss' over the ranking's.
    """

    def __init__(self, loss: Any, columns: Sequence[Sequence[Any]], steps: Sequence[int]) -> None:
        self.loss, self.columns, self.steps = loss, columns, set(steps)
        self.found: dict[str, dict[str, float]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before the batch of an update is read; its gradients are still empty."""
        if state.global_step not in self.steps:
            return
        model = self.loss.model
        training = model.training
        model.eval()
        parts = self.loss([features(model, column) for column in self.columns])
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [
            _flat(torch.autograd.grad(parts[name], parameters, retain_graph=True, allow_unused=True), parameters)
            for name in ("ranking", "condensation")
        ]
        model.train(training)
        ranking, condensation = (gradient.norm() for gradient in gradients)
        if ranking and condensation:
            cosine = torch.dot(*gradients) / (ranking * condensation)
            self.found[str(state.global_step)] = {"cosine": float(cosine), "ratio": float(condensation / ranking)}


def information(loss: Any, columns: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Nats per target token with the source's `own` BToks, and with those of an `other` row; after training.

    The inputs of the two columns must be few enough for one pass.
    """
    model = loss.model.eval()
    found = {}
    for name, shift in (("own", 0), ("other", 1)):
        moved = [*columns[1][shift:], *columns[1][:shift]]
        with torch.no_grad():
            loss([features(model, columns[0]), features(model, moved)])
        found[name] = float(loss.measured.nll)
    return found


def features(model: SentenceTransformer, inputs: Sequence[Any]) -> dict[str, Any]:
    """A column as the loss reads it, on the model's device."""
    found = model.preprocess(list(inputs))
    return {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in found.items()}


def _flat(gradients: Sequence[torch.Tensor | None], parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
