"""The weight over the steps, with and without a Trainer."""

from __future__ import annotations

import math

import pytest

from st_btok.training.callback import Schedule


def test_constant_and_first_steps():
    assert Schedule(0.3)() == 0.3
    schedule = Schedule(5.0, steps=2)
    values = []
    for schedule.step in range(4):
        values.append(schedule())
    assert values == [5.0, 5.0, 0.0, 0.0]


def test_functions_of_the_step():
    schedule = Schedule(lambda step: 1 / (1 + step), steps=3)
    schedule.step = 1
    assert schedule() == 0.5
    schedule.step = 3
    assert schedule() == 0.0


@pytest.mark.parametrize("arguments", [(-0.1,), (math.nan,), (math.inf,), (1.0, -1)])
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 0"):
        Schedule(*arguments)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_functions_that_leave_the_range_are_refused_with_their_step(value):
    schedule = Schedule(lambda step: value if step == 7 else 1.0)
    schedule.step = 0
    assert schedule() == 1.0
    schedule.step = 7
    with pytest.raises(ValueError, match=f"got {float(value)} at step 7"):
        schedule()


@pytest.mark.parametrize("schedule", [Schedule(1.0, steps=3), Schedule(lambda step: 1.0)], ids=["steps", "function"])
def test_a_schedule_without_a_step_is_an_error(schedule):
    """Not the first weight for ever."""
    with pytest.raises(ValueError, match=r"callbacks=\[BTokCallback\(\)\], or set loss.schedule.step"):
        schedule()
