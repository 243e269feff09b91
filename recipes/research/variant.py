"""A variant by its name, as on the command line; light to import.

A variant is named `btok`, `lasttoken` or `mean`, with options behind a colon that reach `build_model` and the loss by
their own names: `btok:condensation_weight=0`, `btok:readout=last,num_btoks=1`. Two more are for controls:
`train_btoks=false` keeps the token embeddings of the BToks as they start, and `row_lr=10` multiplies their learning
rate (with LoRA, where they are parameters of their own). With `opened=true` the BToks, or the token
that is read, stand in the assistant's opened turn; `lasttoken` and `mean` also take a prompt as plain text,
`lasttoken:prompt= The topic is the`: see `prompted.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

POOLINGS = ("btok", "lasttoken", "mean")


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared.

    Args:
        pooling: `btok`, `lasttoken` (the state of the last ordinary token) or `mean` (of all tokens).
        options: Values for `build_model` and the loss, by their names.
    """

    pooling: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read `pooling` or `pooling:name=value,name=value`; values are JSON, or text where they are not."""
        pooling, _, rest = text.partition(":")
        if pooling not in POOLINGS:
            raise ValueError(f"a pooling must be one of {POOLINGS}, with options behind a colon, got {text!r}.")
        options = {}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"an option of a pooling must be name=value, got {part!r} in {text!r}.")
            try:
                options[name] = json.loads(value)
            except ValueError:
                options[name] = value
        return cls(pooling, options)


@dataclass(frozen=True)
class VariantSettings:
    """What all variants share.

    Args:
        backbone: Hub name or path.
        steps: Optimizer steps.
        batch_size: Pairs a step, each the others' negative.
        mini_batch_size: Rows in memory at a time (GradCache); 0: the whole batch.
        learning_rate: Peak; cosine decay.
        warmup_steps: Steps of linear warm-up; None: a tenth of the steps, at most 100.
        tuning: `full` or `lora`.
        lora: `r`, `alpha` and `dropout` of the adapters.
        build: For `build_model`, as far as the plain poolings know it too: `max_seq_length`, `model_kwargs`, and
            `min_pixels` and `max_pixels`.
        device: Where to train; None: what the Trainer picks.
        bf16: Autocast to bfloat16.
    """

    backbone: str
    steps: int
    batch_size: int = 64
    mini_batch_size: int = 0
    learning_rate: float = 5e-5
    warmup_steps: int | None = None
    tuning: str = "lora"
    lora: Mapping[str, Any] = field(default_factory=lambda: {"r": 16, "alpha": 32, "dropout": 0.05})
    build: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    bf16: bool = False
