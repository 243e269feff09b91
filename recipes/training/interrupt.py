"""Ctrl-C ends a training with a checkpoint, from which `--resume` goes on."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerState


class SaveOnInterrupt(TrainerCallback):
    """The step in work is finished and a checkpoint saved; a second Ctrl-C stops at once.

    Used as a context around `trainer.train()`. With several processes it does nothing: they would stop at different
    steps and wait for each other, so there the checkpoints of `--save_steps` are what is left.

    Attributes:
        stopped: Whether a training was ended before its last step.
    """

    def __init__(self) -> None:
        self.asked = self.stepping = self.stopped = False

    def __enter__(self) -> SaveOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.stepping:
            signal.default_int_handler(number, frame)
        self.asked = True
        sys.stderr.write(
            "\nst_btok: this step is finished and saved, then the training stops. Ctrl-C again: at once.\n"
        )

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """From the first step on there is something to save."""
        self.stepping = args.world_size == 1

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save and stop, if it was asked for."""
        if self.asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
