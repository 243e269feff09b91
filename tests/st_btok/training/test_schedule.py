"""The weight over the steps, with and without a Trainer."""

from __future__ import annotations

import math

import pytest
from transformers.trainer import DEFAULT_CALLBACKS

from st_btok.training.schedule import Schedule


def test_constant_and_first_steps():
    assert Schedule(0.3)() == 0.3
    schedule = Schedule(5.0, steps=2)
    values = []
    for schedule.step in range(4):
        values.append(schedule())
    assert values == [5.0, 5.0, 0.0, 0.0]
    assert Schedule(5.0, steps=0)() == 0.0


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
    assert schedule() == 1.0
    schedule.step = 7
    with pytest.raises(ValueError, match=f"got {float(value)} at step 7"):
        schedule()


def test_only_schedules_that_need_the_step_touch_the_trainer():
    before = list(DEFAULT_CALLBACKS)
    Schedule(1.0)
    assert before == DEFAULT_CALLBACKS
    Schedule(1.0, steps=3)
    Schedule(1.0, steps=3)
    assert len(set(DEFAULT_CALLBACKS)) == len(DEFAULT_CALLBACKS), "registered once"
