"""Controls: `BTokLoss` with one of its ideas taken out or moved, for `recipes.compare` and the study.

Each answers a question about the method. None of them is a way to train an embedder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_btok import BTokLoss, CachedBTokLoss


class ControlLoss(BTokLoss):
    """`BTokLoss` with further values of its arguments.

    Args:
        model: A BTok model.
        route: Also `"unmasked"`: the target reads its input as well, so nothing has to pass through the bottleneck
            tokens. The paper's ablation without the mask, and `generation_kv_mode: full` of the authors' release.
        target: Also `"self"`: every text is generated from its own bottleneck tokens, as autoencoders learn from
            documents without queries.
        condensation_warmup: The condensation loss is trained alone for the first so many optimizer steps, as decoders
            are taught to reconstruct before they embed (SimLM, https://arxiv.org/abs/2207.02578). Default 0.
        condensation_btoks: Targets read the first so many bottleneck tokens only. With `readout="last"` a further
            token then embeds and takes no part in the condensation loss, which separates the two. Default: all.
        **options: All other arguments of `BTokLoss`.

    Raises:
        ValueError: As `BTokLoss`; or if a number is out of range.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        route: Any = "auto",
        target: Any = "auto",
        condensation_warmup: int = 0,
        condensation_btoks: int | None = None,
        **options: Any,
    ) -> None:
        if condensation_warmup < 0:
            raise ValueError(f"condensation_warmup must be at least 0, got {condensation_warmup}.")
        self_target, unmasked = target == "self", route == "unmasked"
        given = {"route": "attention" if unmasked else route, "target": "both" if self_target else target}
        super().__init__(model, **given, **options)
        if condensation_btoks is not None and not 1 <= condensation_btoks <= len(self.btoks):
            raise ValueError(
                f"condensation_btoks must be 1 to {len(self.btoks)}, the number of bottleneck tokens, got "
                f"{condensation_btoks}."
            )
        self.self_target, self.unmasked, self.condensation_warmup = self_target, unmasked, condensation_warmup
        self.read_btoks = self.btoks[:condensation_btoks]

    def targets(self, columns: list[dict[str, Any]]) -> list[list[Tensor] | None]:
        """With `target="self"` queries and positives exchange what they generate."""
        query, positive, *others = super().targets(columns)
        return [positive, query, *others] if self.self_target else [query, positive, *others]

    def join(self, part: Any) -> Any:
        """Without the mask no position is a target's or an input's."""
        joint = super().join(part)
        return replace(joint, segments=torch.zeros_like(joint.segments)) if self.unmasked else joint

    def rank(self, embeddings: list[Tensor], fingerprints: list[Tensor]) -> Tensor:
        """No ranking during the warm-up."""
        ranking = super().rank(embeddings, fingerprints)
        if not self.condensation_warmup:
            return ranking
        if self.schedule.step is None:
            raise ValueError("condensation_warmup needs the step: give the Trainer callbacks=[BTokCallback()].")
        return ranking * (self.schedule.step >= self.condensation_warmup)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {
            **super().get_config_dict(),
            **({"route": "unmasked"} if self.unmasked else {}),
            **({"target": "self"} if self.self_target else {}),
            "condensation_warmup": self.condensation_warmup,
            "condensation_btoks": len(self.read_btoks),
        }


class CachedControlLoss(CachedBTokLoss):
    """`ControlLoss` under GradCache; arguments as those of `CachedBTokLoss`."""

    loss_class = ControlLoss


def btok_loss(model: SentenceTransformer, mini_batch_size: int = 0, **options: Any) -> BTokLoss | CachedBTokLoss:
    """The loss of a variant: `BTokLoss`, or `ControlLoss` if it alone knows the options; cached with mini-batches."""
    control = options.get("route") == "unmasked" or options.get("target") == "self"
    control = control or not options.keys().isdisjoint(("condensation_warmup", "condensation_btoks"))
    if mini_batch_size:
        options["mini_batch_size"] = mini_batch_size
        return (CachedControlLoss if control else CachedBTokLoss)(model, **options)
    return (ControlLoss if control else BTokLoss)(model, **options)
