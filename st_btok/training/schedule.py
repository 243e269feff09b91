"""The weight of the condensation term over the training steps."""

from __future__ import annotations

import math
from collections.abc import Callable


class Schedule:
    """Weight of the condensation term at each optimizer step.

    Args:
        weight: A constant (at least 0), or a function of the step (0 for the first update) that returns one.
        steps: The term is on for the first `steps` updates and off after; None for always. The authors' presets use
            weight 5.0 for 2,000 of 5,000 steps.

    Attributes:
        step: Updates taken so far. `BTokCallback` sets it from the Trainer; in a loop of your own set it yourself.

    Raises:
        ValueError: If the weight is negative, infinite or NaN, or `steps` is negative.
    """

    def __init__(self, weight: float | Callable[[int], float], steps: int | None = None) -> None:
        if not callable(weight):
            check_weight(weight)
        if steps is not None and steps < 0:
            raise ValueError(f"condensation_steps must be at least 0 (or None for always), got {steps}.")
        self.weight, self.steps = weight, steps
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
        if self.step is None:
            raise ValueError(
                "the weight of the condensation term depends on the optimizer step, and the loss was told none. Give "
                "the Trainer callbacks=[BTokCallback()], or set loss.schedule.step in a training loop of your own."
            )
        if self.steps is not None and self.step >= self.steps:
            return 0.0
        if callable(self.weight):
            return check_weight(self.weight(self.step), f" at step {self.step}")
        return float(self.weight)


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
