"""The weight over the steps, with and without a Trainer."""

from __future__ import annotations

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


@pytest.mark.parametrize("arguments", [(-0.1,), (1.0, -1)])
def test_negative_values_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 0"):
        Schedule(*arguments)


def test_only_schedules_that_need_the_step_touch_the_trainer():
    before = list(DEFAULT_CALLBACKS)
    Schedule(1.0)
    assert before == DEFAULT_CALLBACKS
    Schedule(1.0, steps=3)
    Schedule(1.0, steps=3)
    assert len(set(DEFAULT_CALLBACKS)) == len(DEFAULT_CALLBACKS), "registered once"
