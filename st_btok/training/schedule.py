"""The weights of both parts of the loss over the training steps."""

from __future__ import annotations

import math
from collections.abc import Callable


class Schedule:
    """Weight of the condensation term at each optimizer step.

    Args:
        weight: A constant (at least 0), or a function of the step (0 for the first update) that returns one.
        steps: The term is on for the first `steps` updates and off after; None for always. The authors' presets use
            weight 5.0 for 2,000 of 5,000 steps.
        warmup: The term is alone for the first `warmup` updates: the ranking part counts from the next one on.
            Default 0.

    Attributes:
        step: Updates taken so far. `BTokCallback` sets it from the Trainer; in a loop of your own set it yourself.

    Raises:
        ValueError: If the weight is negative, infinite or NaN, or `steps` or `warmup` is negative.
    """

    def __init__(self, weight: float | Callable[[int], float], steps: int | None = None, warmup: int = 0) -> None:
        if not callable(weight):
            check_weight(weight)
        if steps is not None and steps < 0:
            raise ValueError(f"condensation_steps must be at least 0 (or None for always), got {steps}.")
        if warmup < 0:
            raise ValueError(f"condensation_warmup must be at least 0, got {warmup}.")
        self.weight, self.steps, self.warmup = weight, steps, warmup
        self.step: int | None = None

    def __call__(self) -> float:
        """The weight at the current step.

        Returns:
            At least 0.

        Raises:
            ValueError: If the weight depends on the step and no step has arrived: going on with the first weight would
                be another training than the one asked for.
        """
        if not callable(self.weight) and self.steps is None:
            return float(self.weight)
        step = self._step()
        if self.steps is not None and step >= self.steps:
            return 0.0
        if callable(self.weight):
            return check_weight(self.weight(step), f" at step {step}")
        return float(self.weight)

    def ranking(self) -> float:
        """The weight of the ranking part at the current step.

        Returns:
            0.0 during the warm-up, 1.0 after it.

        Raises:
            ValueError: If there is a warm-up and no step has arrived.
        """
        return 1.0 if self.warmup == 0 or self._step() >= self.warmup else 0.0

    def _step(self) -> int:
        if self.step is None:
            raise ValueError(
                "the weight of a part of the loss depends on the optimizer step, and the loss was told none. Give "
                "the Trainer callbacks=[BTokCallback()], or set loss.schedule.step in a training loop of your own."
            )
        return self.step


def check_weight(weight: float, place: str = "") -> float:
    """Refuse a weight that would turn the term around (negative) or the loss into NaN.

    Args:
        weight: The weight.
        place: Where it comes from, for the message.

    Returns:
        The weight as a float.

    Raises:
        ValueError: If it is negative, infinite or NaN.
    """
    value = float(weight)
    if not (value >= 0 and math.isfinite(value)):  # NaN compares false with everything
        raise ValueError(f"condensation_weight must be at least 0 and finite, got {value}{place}.")
    return value
