"""What only the Trainer knows, for the losses, and what only the losses know, for the Trainer's log and card.

A schedule needs the number of optimizer steps taken. A loss can't see it: it is not the number of its calls (under
gradient accumulation) and it does not start at 0 (after resuming). sentence-transformers hands a loss nothing but
features and labels, so the step comes through a callback. A callback belongs to one Trainer, so the user passes it.
It finds the losses through the model that both sides hold. So it does not matter who makes the loss, or when.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL.Image import Image
from sentence_transformers.base.model_card import BaseModelCardData
from sentence_transformers.sentence_transformer.losses import adaptive_layer, matryoshka
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from st_btok.model_parts import unwrap

# BibTeX of the method.
CITATION = """
@misc{bottlenecktokens2026,
    title={Bottleneck Tokens for Unified Multimodal Retrieval},
    year={2026},
    eprint={2604.11095},
    archivePrefix={arXiv},
    primaryClass={cs.CV},
    url={https://arxiv.org/abs/2604.11095},
}
"""


# --- the weight over the steps -----------------------------------------


class Schedule:
    """Weight of the condensation loss at each optimizer step.

    Args:
        weight: A constant (at least 0), or a function of the step (0 for the first update) that returns one.
        steps: The condensation loss is on for the first `steps` updates and off after; None for always. The authors'
            presets use weight 5.0 for 2,000 of 5,000 steps.

    Attributes:
        step: Updates taken so far. `BTokCallback` sets it from the Trainer; in a loop of your own set it yourself.
    """

    def __init__(self, weight: float | Callable[[int], float], steps: int | None = None) -> None:
        if not callable(weight):
            check_weight(weight)
        if steps is not None and steps < 0:
            raise ValueError(f"condensation_steps must be at least 0 (or None for always), got {steps}.")
        self.weight, self.steps = weight, steps
        self.step: int | None = None

    def __call__(self) -> float:
        """The weight at the current step, at least 0.

        A `ValueError` if it depends on the step and no step has arrived: going on with the first weight would be
        another training than the one asked for.
        """
        if not callable(self.weight) and self.steps is None:
            return float(self.weight)
        if self.step is None:
            raise ValueError(
                "the weight of a part of the loss depends on the optimizer step, and the loss was told none. Give "
                "the Trainer callbacks=[BTokCallback()], or set loss.schedule.step in a training loop of your own."
            )
        if self.steps is not None and self.step >= self.steps:
            return 0.0
        if callable(self.weight):
            return check_weight(self.weight(self.step), f" at step {self.step}")
        return float(self.weight)


def check_weight(weight: float, place: str = "") -> float:
    """The weight as a float; a `ValueError` if it would turn the condensation loss around (negative) or into NaN.

    `place` says in the message where it comes from.
    """
    value = float(weight)
    if not (value >= 0 and math.isfinite(value)):  # NaN compares false with everything
        raise ValueError(f"condensation_weight must be at least 0 and finite, got {value}{place}.")
    return value


# --- what the losses measure, and the callback -----------------------------------------


@dataclass
class Measured:
    """What one call of a loss measured, besides its value."""

    ranking: Tensor  # the ranking part
    nll: Tensor  # the condensation loss without its weight: nats per target token
    tokens: Tensor  # target tokens that it is the mean over
    weight: float  # its weight
    read: Tensor  # tokens that the call read, inputs and targets, of this process
    leak: float | None  # what the leak probe measured; None where no probe was needed


# The callback that follows each model's training now; read by the losses of that model.
_FOLLOWING: WeakKeyDictionary[nn.Module, BTokCallback] = WeakKeyDictionary()


class BTokCallback(TrainerCallback):
    """Tells the losses of a model the optimizer step, and logs what they measure.

    For `SentenceTransformerTrainer(..., callbacks=[BTokCallback()])`. Without it training is the same, but a
    `condensation_weight` that depends on the step is an error, and only the loss and its weighted parts are logged.
    With it every log entry also has, as means over the calls since the last one, on this process (`eval_` before the
    name in evaluation, `eval_NAME_` for one of several evaluation sets):

    - `condensation_nll`: the condensation loss without its weight, in nats per target token;
    - `condensation_weight`, `condensation_tokens`: its weight, and the target tokens of a batch;
    - `condensation_leak`: what the leak probe measured, where one was needed: 0;
    - `tokens_per_second`: inputs and targets read from log to log, whatever else that time was spent on; in training.
    - `ranking`, `condensation`: the weighted parts, for every evaluation set by itself. (sentence-transformers logs
      them in training, and for a single evaluation set.)

    It also keeps the model card whole for columns of dicts; see `sanitize_model_card`.

    The values reach `trainer.state.log_history`, the progress bar, and the callbacks behind this one. A Trainer puts
    its reports (Weights & Biases, TensorBoard) before the callbacks that it is given; to have these values in them:
    `trainer.callback_handler.callbacks.insert(0, BTokCallback())` once the Trainer is made.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        # Sums over the calls since the last log; of tensors, so that nothing waits for a GPU before it is logged.
        self._sums: dict[str, Any] = {"train": Counter(), "eval": Counter()}
        self._since = time.perf_counter()
        self._leak: float | None = None
        self._last: Measured | None = None  # of the last call in evaluation mode
        self._finished = False

    @staticmethod
    def of(model: Any) -> BTokCallback | None:
        """The callback that follows a model, wrapped or not.

        None where there is none, and for a model that trains on after its callback's training has ended: another
        training must not be given that one's last step.
        """
        inner = unwrap(model)
        callback = _FOLLOWING.get(inner)
        return None if callback is not None and callback._finished and inner.training else callback

    def record(self, measured: Measured, training: bool) -> None:
        """Take one call of a loss, in training mode or not, into the next log entry."""
        if training:
            self._add("train", measured)
        else:
            self._last = measured

    def _add(self, kind: str, one: Measured) -> None:
        own = {"calls": 1, "ranking": one.ranking, "condensation": one.weight * one.nll, "weight": one.weight}
        self._sums[kind].update({**own, "nll": one.nll * one.tokens, "tokens": one.tokens, "read": one.read})
        self._leak = one.leak if one.leak is not None else self._leak

    def _follow(self, state: TrainerState, model: nn.Module | None, finished: bool = False) -> None:
        self.step, self._finished = state.global_step, finished
        if model is not None:
            _FOLLOWING[unwrap(model)] = self

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluation may come before training."""
        self._follow(state, kwargs.get("model"))

    on_step_begin = on_init_end  # before the first batch of an update

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """The first step: 0, or that of the checkpoint that training goes on from."""
        model = kwargs.get("model")
        self._follow(state, model)
        self._sums["train"], self._since = Counter(), time.perf_counter()
        if model is not None:
            sanitize_model_card(unwrap(model).model_card_data)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After each batch of an evaluation: other calls in evaluation mode are not the Trainer's."""
        if self._last is not None:
            self._add("eval", self._last)
        self._last = None

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluation may come after training."""
        self._follow(state, kwargs.get("model"), finished=True)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the means to the entry that is being logged."""
        # The Trainer logs `loss` in training, and `eval_loss`, `eval_NAME_loss` or the like at the end of each
        # evaluation. Its last entry of a training has `train_loss`.
        losses = [key for key in logs or {} if key == "loss" or (key.endswith("_loss") and key != "train_loss")]
        if logs is None or not losses:
            return
        kind, prefix = ("train", "") if "loss" in losses else ("eval", losses[0].removesuffix("loss"))
        sums, self._sums[kind] = self._sums[kind], Counter()
        now, since = time.perf_counter(), self._since
        if kind == "train":
            self._since = now
        if not sums:
            return
        means = {name: float(value) / sums["calls"] for name, value in sums.items()}
        found = {"condensation_weight": means["weight"], "condensation_tokens": means["tokens"]}
        if means["tokens"]:
            found["condensation_nll"] = means["nll"] / means["tokens"]
        if self._leak is not None:
            found["condensation_leak"] = self._leak
        if kind == "train":
            found["tokens_per_second"] = float(sums["read"]) / (now - since)
        else:
            # sentence-transformers logs them under `eval_loss` only, as means that hold other sets' batches as well.
            found |= {"ranking": means["ranking"], "condensation": means["condensation"]}
        rounded = {prefix + name: round(value, 4) for name, value in found.items()}
        logs.update(rounded)
        state.log_history[-1].update(rounded)  # the Trainer has put a copy there already


# --- whether a loss modifier is at work -----------------------------------------

# What they put in place of the model's forward while they run.
_DECORATORS = (matryoshka.ForwardDecorator, adaptive_layer.ForwardDecorator)


def in_modifier(model: Any) -> bool:
    """Whether one of sentence-transformers' loss modifiers is calling a loss of this model, wrapped or not.

    `MatryoshkaLoss`, `AdaptiveLayerLoss` and `Matryoshka2dLoss` call a loss once per dimension or layer, multiply what
    it returns and add it up. They want a number, and fail with a dict of parts, which the Trainer likes. The cached
    losses need none of this: there a modifier wraps `calculate_loss` and hands on what the loss returns.
    """
    layers = (model, unwrap(model))  # MatryoshkaLoss decorates what it was given, AdaptiveLayerLoss what is inside
    return any(isinstance(vars(layer).get("forward"), _DECORATORS) for layer in layers)


# --- weights that can't hold their own updates -----------------------------------------

_HALF = (torch.float16, torch.bfloat16)
# What DeepSpeed leaves on parameters whose float32 copy it updates (ZeRO 1 and 2; ZeRO 3).
_MASTER_COPY = ("_hp_mapping", "ds_id")


def half_precision_warning(model: nn.Module) -> str | None:
    """Why training this model as it is loses updates, with the remedy; None if it does not.

    A bfloat16 weight keeps 8 bits: an update of less than 1/512 of the weight is rounded away, which most are at
    learning rates below 1e-4. In float16 AdamW's epsilon (1e-8) and its mean of small squared gradients are 0, and its
    step divides by them. Weights of which the optimizer updates a float32 copy lose nothing.
    """
    found: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        half = parameter.requires_grad and parameter.dtype in _HALF
        if half and not any(hasattr(parameter, mark) for mark in _MASTER_COPY):
            found[parameter.dtype] = found.get(parameter.dtype, 0) + parameter.numel()
    if not found:
        return None
    kinds = " and ".join(f"{count:,} in {str(dtype).removeprefix('torch.')}" for dtype, count in found.items())
    return (
        f"half-precision weights are trained ({kinds}): small updates round to nothing in bfloat16, and AdamW gives "
        'NaN in float16. Build with model_kwargs={"dtype": "float32"} and train under autocast (bf16=True in the '
        "training arguments). To keep a frozen base in half precision, make only what trains float32: "
        "for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data"
    )


# --- the model card -----------------------------------------


def sanitize_model_card(card: BaseModelCardData) -> None:
    """Leave widget examples of text only, and say in words what dicts and lists among the examples hold.

    sentence-transformers 6.2 shows columns of pictures as files beside the card. Columns of dicts, which hold a
    picture and its question, it takes for columns of text: their pictures end up as widget examples, which YAML writes
    and can't read back, so that the whole card is dropped with an error; and as `<PIL.Image ... at 0x...>` among the
    examples. Those are taken when the Trainer is made.
    """
    card.widget = [example for example in card.widget if all(map(_is_text, example.values()))]
    for info in [*card.train_datasets, *card.eval_datasets]:
        examples: Any = info.get("examples") or {}
        for column, values in examples.items():
            # A picture by itself stays: it becomes a file.
            examples[column] = [_in_words(value) if isinstance(value, dict | list) else value for value in values]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _in_words(value: Any) -> Any:
    """The same structure, with words where media stood."""
    if isinstance(value, dict):
        return {key: _in_words(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_words(item) for item in value]
    if isinstance(value, Image):
        return f"picture of {value.width}x{value.height} px"
    return value if isinstance(value, str | int | float | None) else type(value).__name__
