"""What one call of a BTok loss returns: a dict that the Trainer logs, and that loss modifiers can weight and add."""

from __future__ import annotations

import torch
from torch import Tensor


class LossParts(dict[str, Tensor]):
    """The parts of one loss value. The Trainer sums `values()` into the loss and logs all `items()`.

    `values()` are what is optimised: the ranking part and the weighted condensation part (or their joint value, for
    cached losses). `items()` holds them unweighted, with whatever else is to be logged.

    Loss modifiers (`MatryoshkaLoss`, `AdaptiveLayerLoss`) weight and add the values of several calls. Only the ranking
    part takes part in that: the condensation term is a property of the full bottleneck, so it counts once, unweighted.

    Args:
        logged: Scalars by name; holds at least `ranking`.
        ranking: The ranking part.
        condensation: The weighted condensation part; None where `ranking` already holds it.
    """

    def __init__(self, logged: dict[str, Tensor], ranking: Tensor, condensation: Tensor | None) -> None:
        super().__init__(logged)
        self._ranking, self._condensation = ranking, condensation

    def values(self) -> list[Tensor]:  # type: ignore[override]
        """The parts that sum to the loss."""
        return [self._ranking] if self._condensation is None else [self._ranking, self._condensation]

    def sum(self) -> Tensor:
        """The loss."""
        return torch.stack(self.values()).sum()

    def __mul__(self, weight: float) -> LossParts:
        return LossParts({**self, "ranking": self["ranking"] * weight}, self._ranking * weight, self._condensation)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LossParts:
        return self * (1 / divisor)

    def __add__(self, other: LossParts | Tensor | float) -> LossParts:
        if not isinstance(other, LossParts):  # 0.0 to start a sum with, or a term of the modifier's own
            return LossParts({**self, "ranking": self["ranking"] + other}, self._ranking + other, self._condensation)
        logged = {**other, **self, "ranking": self["ranking"] + other["ranking"]}
        parts = [part for part in (self._condensation, other._condensation) if part is not None]
        return LossParts(logged, self._ranking + other._ranking, torch.stack(parts).sum() if parts else None)

    __radd__ = __add__
