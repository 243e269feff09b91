"""The weight of the condensation term over the training steps.

A schedule needs the number of optimizer steps taken, which a loss can't see: it is not the number of its calls (under
gradient accumulation) and it does not start at 0 (after resuming). The Trainer knows, and tells its callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS


class Schedule:
    """Weight of the condensation term at each optimizer step.

    Args:
        weight: A constant (at least 0), or a function of the step (0 for the first update) that returns one.
        steps: The term is on for the first `steps` updates and off after; None for always. The authors' presets use
            weight 5.0 for 2,000 of 5,000 steps.

    Raises:
        ValueError: If the weight is negative, infinite or NaN, or `steps` is negative.
    """

    def __init__(self, weight: float | Callable[[int], float], steps: int | None = None) -> None:
        if not callable(weight):
            check_weight(weight)
        if steps is not None and steps < 0:
            raise ValueError(f"condensation_steps must be at least 0 (or None for always), got {steps}.")
        self.weight, self.steps, self.step = weight, steps, 0
        if callable(weight) or steps is not None:
            _follow_trainers(self)

    def __call__(self) -> float:
        """The weight at the current step."""
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


_FOLLOWING: WeakSet[Schedule] = WeakSet()


class _TrainerSteps(TrainerCallback):
    """Tells every schedule the Trainer's global step, which counts updates and survives resuming."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for schedule in _FOLLOWING:
            schedule.step = state.global_step


def _follow_trainers(schedule: Schedule) -> None:
    """Have every Trainer made from now on report its step; a loss is always made before its Trainer."""
    _FOLLOWING.add(schedule)
    if _TrainerSteps not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(_TrainerSteps)  # type: ignore[arg-type]
