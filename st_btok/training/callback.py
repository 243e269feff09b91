"""What only the Trainer knows, for the losses, and what only the losses know, for the Trainer's log.

A schedule needs the number of optimizer steps taken, which a loss can't see: it is not the number of its calls (under
gradient accumulation) and it does not start at 0 (after resuming). sentence-transformers hands a loss nothing but
features and labels, so the step has to come through a callback, and a callback belongs to a Trainer, not to all of
them: the user passes it. It finds the losses through the model that both sides hold, so it does not matter who makes
the loss, or when.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_btok.model_parts import unwrap
from st_btok.training.card import mend_card


@dataclass
class Measured:
    """What one call of a loss found out beside the loss.

    Attributes:
        nll: The condensation term without its weight: nats per target token.
        tokens: The number of target tokens that it is the mean over.
        weight: Its weight.
        read: Tokens that the call read, inputs and targets, of this process.
        leak: What the leak probe measured; None where no probe was needed.
    """

    nll: Tensor
    tokens: Tensor
    weight: float
    read: Tensor
    leak: float | None


@dataclass
class _Sums:
    """Sums over the calls since the last log; tensors, so that nothing waits for a GPU before it is logged."""

    calls: int = 0
    nll: Any = 0.0
    tokens: Any = 0.0
    weight: float = 0.0
    read: Any = 0
    leak: float | None = None
    since: float = field(default_factory=time.perf_counter)


# The callback that follows each model's training now; read by the losses of that model.
_FOLLOWING: WeakKeyDictionary[nn.Module, BTokCallback] = WeakKeyDictionary()


class BTokCallback(TrainerCallback):
    """Tells the losses of a model the optimizer step, and logs what they measure.

    For `SentenceTransformerTrainer(..., callbacks=[BTokCallback()])`. Without it training is the same, but a
    `condensation_weight` that depends on the step is an error, and only the loss and its weighted parts are logged.
    With it every log entry also has, as means over the calls since the last one, on this process (`eval_` before the
    name in evaluation):

    - `condensation_nll`: the term without its weight, in nats per target token;
    - `condensation_weight`, `condensation_tokens`: its weight, and the target tokens of a batch;
    - `condensation_leak`: what the leak probe measured, where one was needed: 0;
    - `tokens_per_second`: inputs and targets read from log to log, whatever else that time was spent on.

    It also keeps the model card whole for columns of dicts (`card.py`).

    The values reach `trainer.state.log_history`, the progress bar, and the callbacks behind this one. A Trainer puts
    its reports (Weights & Biases, TensorBoard) before the callbacks that it is given; to have these values in them:
    `trainer.callback_handler.callbacks.insert(0, BTokCallback())` once the Trainer is made.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._sums = {"train": _Sums(), "eval": _Sums()}

    @staticmethod
    def of(model: Any) -> BTokCallback | None:
        """The callback that follows the training of a model.

        Args:
            model: The model of a loss, also wrapped.

        Returns:
            The callback, or None where there is none.
        """
        return _FOLLOWING.get(unwrap(model))

    def record(self, measured: Measured, training: bool) -> None:
        """Take one call of a loss into the next log entry.

        Args:
            measured: What the loss measured.
            training: Whether the model was in training mode.
        """
        sums = self._sums["train" if training else "eval"]
        sums.calls += 1
        sums.nll = sums.nll + (measured.nll * measured.tokens).detach()
        sums.tokens = sums.tokens + measured.tokens
        sums.weight += measured.weight
        sums.read = sums.read + measured.read
        sums.leak = measured.leak if sums.leak is None else sums.leak

    def _follow(self, state: TrainerState, model: nn.Module | None) -> None:
        self.step = state.global_step
        if model is not None:
            _FOLLOWING[unwrap(model)] = self

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluation may come before training."""
        self._follow(state, kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step: 0, or that of the checkpoint that training goes on from."""
        model = kwargs.get("model")
        self._follow(state, model)
        self._sums["train"] = _Sums()
        if model is not None:
            mend_card(unwrap(model).model_card_data)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first batch of an update."""
        self._follow(state, kwargs.get("model"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A later training of the same model must not be given this one's last step."""
        if kwargs.get("model") is not None:
            _FOLLOWING.pop(unwrap(kwargs["model"]), None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means to the entry that is being logged."""
        kind = next((kind for kind, key in (("train", "loss"), ("eval", "eval_loss")) if key in (logs or {})), None)
        if logs is None or kind is None or not self._sums[kind].calls:
            return
        sums, self._sums[kind] = self._sums[kind], _Sums()
        seconds = time.perf_counter() - sums.since
        found = {
            "condensation_weight": sums.weight / sums.calls,
            "condensation_tokens": float(sums.tokens) / sums.calls,
            "tokens_per_second": float(sums.read) / seconds,
        }
        if sums.tokens:
            found["condensation_nll"] = float(sums.nll) / float(sums.tokens)
        if sums.leak is not None:
            found["condensation_leak"] = sums.leak
        if kind == "eval":
            del found["tokens_per_second"]  # the time since the last evaluation is that of the training between
        rounded = {("" if kind == "train" else "eval_") + name: round(value, 4) for name, value in found.items()}
        logs.update(rounded)
        state.log_history[-1].update(rounded)  # the Trainer has put a copy there already


def read_tokens(columns: list[dict[str, Any]], targets: list[list[Tensor] | None]) -> Tensor:
    """How many tokens a call reads.

    Args:
        columns: The features of every column.
        targets: Each column's targets, None for columns that generate nothing.

    Returns:
        A scalar, on the device of the features: real input tokens and target tokens.
    """
    generated = sum(len(target) for column in targets if column for target in column)
    return torch.stack([features["attention_mask"].sum() for features in columns]).sum() + generated
