"""Flags of `recipes.train`, in groups, without the Trainer's own: light to import.

`recipes.compare` shares the groups of the pairs and of the backbone. Defaults that differ from sentence-transformers'
are for contrastive training, where every other row of a batch is a negative; each has its reason beside it. A preset
(`presets.py`) sets the authors' values instead; what the command line gives wins over both.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes.command_line import option
from recipes.training.presets import PRESETS

CHOICES = {
    "tuning": ("lora", "dora", "full"),
    "mix": ("weighted", "proportional", "round_robin"),
    "hard_negatives": ("none", "data", "mine"),
    "on_error": ("skip", "raise"),
    "check_media": ("decode", "header"),
    "validation_suite": ("", "mini"),
    "preset": ("", *PRESETS),
}


def check_choices(settings: object) -> None:
    """Refuse a value that is none of its setting's choices."""
    for name, allowed in CHOICES.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(settings, name)!r}.")


def check_shares(settings: Any) -> None:
    """Refuse own pairs beside the MMEB-V2 mix without their shares: they would count by rows, and be nearly all."""
    if settings.mmeb_root and settings.data and settings.mix == "weighted" and not settings.data_weights:
        raise ValueError(
            "--data beside --mmeb_root needs --data_weights, one for each: own pairs weigh as many as their rows, the "
            f"25 sources of the mix 52 together. Pass --data_weights{' 5' * len(settings.data)}, or other shares."
        )


@dataclass
class RunSettings:
    """What runs."""

    _argument_group_name = "run"
    preset: str = option("", f"Authors' settings: {', '.join(PRESETS)}.")
    resume: bool = option(False, "Go on from the newest whole checkpoint in output_dir.")
    allow_changes: bool = option(False, "Resume although data, seed or model are not those of the interrupted run.")


@dataclass
class PairSettings:
    """Your own pairs."""

    _argument_group_name = "data"
    data: list[str] = option([], "Your own pairs: files, folders or hub names.")
    on_error: str = option("skip", "Broken rows: skip or raise.")
    check_media: str = option("decode", "decode: read every file to its end once; header: parse headers only.")
    validation_size: int = option(200, "Validation rows held out per source, at most a tenth; 0: none.")


@dataclass
class DataSettings(PairSettings):
    """What is trained on."""

    data_weights: list[float] = option(
        [],
        "Shares of `data` in the mix; by default the number of rows. Beside mmeb_root (52 together) needed.",
    )
    stream: bool = option(False, "Read and check `data` while training; also tar shards. Needs max_steps.")
    shuffle_buffer: int = option(1000, "Streaming: rows among which the next one is drawn; 0: in order.")
    mmeb_root: str = option("", "Folder with the sources of the MMEB-V2 mix; empty: do not train on it.")
    mmeb_sources: list[str] = option([], "Sources of the mix; all 25 by default.")
    max_rows: int | None = option(None, "First rows of each MMEB source only.")
    check_processes: int = option(1, "Processes that check the data.")
    recheck: bool = option(False, "Check again what was checked before.")
    mix: str = option("weighted", "Sources: weighted (by their weights), proportional (to size) or round_robin.")
    block_size: int = option(0, "Rows that come from one source in a row; a multiple of the batch size; 0: a batch.")
    distinct: bool = option(False, "No query or positive twice in a batch. Not for label sets.")
    hard_negatives: str = option("data", "data (its own columns), none, or mine (nearest other positives).")
    num_negatives: int = option(1, "Mined negatives per pair.")
    miner: str = option("", "Embedder that mines: a trained one, name or path.")
    validation_suite: str = option("", "mini: also score the validation split of the mini suite.")


@dataclass
class BackboneSettings:
    """The backbone, and which of its parameters train."""

    _argument_group_name = "model"
    backbone: str = option("", "Decoder-only (multimodal) language model: hub name or path.")
    max_seq_length: int | None = option(None, "Longest input in tokens.")
    min_pixels: int | None = option(None, "Smallest image area.")
    max_pixels: int | None = option(None, "Largest image area.")
    dtype: str = option("float32", "Type of the weights.")
    attn_implementation: str | None = option(None, "Attention of the backbone.")
    tuning: str = option("lora", "lora, dora or full.")
    lora_r: int = option(16, "Rank.")
    lora_alpha: int = option(32, "Scale; the update is alpha / r times the product.")
    lora_dropout: float = option(0.05, "Dropout on the adapter's input.")


@dataclass
class ModelSettings(BackboneSettings):
    """What is built and which parameters train."""

    num_btoks: int = option(4, "K.")
    readout: str = option("mean", "mean, last, or attention (the model then needs st_btok to load).")
    template: str = option("chat", "chat or plain (the authors' layout).")


@dataclass
class LossSettings:
    """What is optimised."""

    _argument_group_name = "loss"
    scale: float = option(50.0, "Inverse temperature.")
    condensation_weight: float = option(0.2, "Weight of the condensation loss.")
    condensation_steps: int | None = option(None, "Steps that it is on for; always by default.")
    target: str = option("", "Generated side: auto, query, positive, both, none; empty: each source's own.")
    max_target_tokens: int = option(64, "Longest target.")
    route: str = option("auto", "How the target reaches the BToks: auto, or a route of BTokLoss.")
    false_negative_margin: float | None = option(None, "Drop negatives that score above the positive by this margin.")
    # GradCache by default: 64 pairs with pictures don't fit most cards at once. Equal in value and gradients.
    mini_batch_size: int = option(8, "Rows in memory at a time (GradCache); 0: the whole batch at once, faster.")
    gather_across_devices: bool = option(False, "Negatives from all processes.")


@dataclass
class TrainerDefaults:
    """The Trainer's own arguments whose defaults are ours."""

    _argument_group_name = "training arguments of sentence-transformers and transformers"
    # Every pair has batch - 1 negatives: 7 at the Trainer's default of 8, next to no signal at temperature 0.02.
    per_device_train_batch_size: int = option(
        64, "Pairs a step and device; each is the negative of the others.", "--batch_size"
    )
    # A tenth of the steps: at temperature 0.02 the first gradients are the largest of all.
    warmup_steps: float = option(0.1, "Steps of warm-up; below 1 a share of all steps.")
    # A few hundred steps are a usual training; the Trainer's default of 500 would log it once or never.
    logging_steps: float = option(10, "Log both parts of the loss every so many steps; below 1 a share of all steps.")
    logging_first_step: bool = option(True, "Log the first step too: where the loss starts.")
    # The Trainer's default of 500 steps would save a short training never, and an interruption would cost all of it.
    save_steps: float = option(0.1, "Save a checkpoint every so many steps; below 1 a share of all steps.")
    save_total_limit: int | None = option(2, "Checkpoints that are kept, the newest and the best.")
    # What training gained can only be said against what was there.
    eval_on_start: bool = option(True, "Score the held-out rows before the first step.")


def trainer_flags() -> dict[str, str]:
    """Every training argument of sentence-transformers with its help, read from the sources without importing them.

    Importing them takes ten seconds, and `--help` or a mistyped flag is to be answered at once.
    """
    found: dict[str, str] = {}
    for package, file in (
        ("transformers", "training_args.py"),
        ("sentence_transformers", "base/training_args.py"),
        ("sentence_transformers", "sentence_transformer/training_args.py"),
    ):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for cls in ast.parse((Path(folder) / file).read_text(encoding="utf-8")).body:
                if isinstance(cls, ast.ClassDef) and cls.name.endswith("TrainingArguments"):
                    found |= {name: text for name, text in map(_flag, cls.body) if name}
    return found


def _flag(statement: ast.stmt) -> tuple[str, str]:
    """Name and help of a field of a dataclass; the name is empty where a statement is none."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return "", ""
    helps = [
        value.value
        for node in ast.walk(statement)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant)
    ]
    return statement.target.id, str(helps[0]) if helps else ""
