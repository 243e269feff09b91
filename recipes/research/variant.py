"""A variant by its name, as on the command line; light to import.

A variant is named `btok`, `lasttoken` or `mean`, with options behind a colon that reach `build_model` and the loss by
their own names: `btok:condensation_weight=0`, `btok:readout=last,num_btoks=1`. Two more are for controls:
`train_btoks=false` keeps the token embeddings of the BToks as they are initialised, and `row_lr=10` multiplies their
learning rate (with LoRA, where they are parameters of their own). With `opened=true` the BToks, or the token that is
read, stand in the assistant's opened turn; `lasttoken` and `mean` also take a prompt as plain text,
`lasttoken:prompt= The topic is the`: see `prompted.py`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
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
            near = get_close_matches(pooling, POOLINGS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"a pooling must be one of {POOLINGS}, with options behind a colon, got {text!r}.{hint}")
        options: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"an option of a pooling must be name=value, got {part!r} in {text!r}.")
            known = options_of(pooling)
            if name not in known:
                near = get_close_matches(name, known, n=1)
                told = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(sorted(known))}."
                raise ValueError(f"{name!r} in {text!r} is no option of {pooling}. {told}")
            try:
                options[name] = json.loads(value)
            except ValueError:
                options[name] = value
        return cls(pooling, options)


# What a comparison sets itself, so that no variant can.
_GIVEN = {"self", "model", "backbone", "processor", "device", "mini_batch_size"}
_RANKING = (
    "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking",
    "MultipleNegativesRankingLoss",
)


@cache
def options_of(pooling: str) -> frozenset[str]:
    """The options that a pooling takes: the arguments of what they are handed to."""
    names = {"opened"} | _arguments(*_RANKING)
    if pooling == "btok":
        names |= {"train_btoks", "row_lr"} | _arguments("st_btok.model", "build_model")
        names |= _arguments("st_btok.training.loss", "BTokLoss")
        names |= _arguments("recipes.research.controls", "ControlLoss")
    else:
        names |= {"prompt"}
    return frozenset(names - _GIVEN)


def _arguments(module: str, name: str) -> set[str]:
    """Arguments of a function or a class, read from its source: importing these modules takes ten seconds."""
    package, *parts = module.split(".")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} must be installed.")
    source = Path(found.submodule_search_locations[0]).joinpath(*parts).with_suffix(".py").read_text(encoding="utf-8")
    node: Any = next(node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    if isinstance(node, ast.ClassDef):
        node = next(inner for inner in node.body if getattr(inner, "name", "") == "__init__")
    return {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}


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
