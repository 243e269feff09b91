"""Settings of `recipes.train`: what is ours, in groups, beside all training arguments of sentence-transformers.

Defaults that differ from sentence-transformers' are for contrastive training, where every other row of a batch is a
negative; each has its reason beside it. A preset (`presets.py`) sets the authors' values instead; what the command
line gives wins over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import HfArgumentParser

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


def _option(default: object, text: str) -> Any:
    make: dict[str, Any] = {"default_factory": lambda: list(default)} if isinstance(default, list) else {}
    return field(metadata={"help": text}, **(make or {"default": default}))


@dataclass
class RunSettings:
    """What runs."""

    _argument_group_name = "run"
    preset: str = _option("", f"Authors' settings: {', '.join(PRESETS)}.")
    resume: bool = _option(False, "Go on from the newest whole checkpoint in output_dir.")
    allow_changes: bool = _option(False, "Resume although data, seed or model are not those of the interrupted run.")


@dataclass
class DataSettings:
    """What is trained on."""

    _argument_group_name = "data"
    data: list[str] = _option([], "Your own pairs: files, folders or hub names.")
    data_weights: list[float] = _option([], "Shares of `data` in the mix; by default the number of rows.")
    stream: bool = _option(False, "Read and check `data` while training; also tar shards. Needs max_steps.")
    shuffle_buffer: int = _option(1000, "Streaming: rows among which the next one is drawn; 0: in order.")
    mmeb_root: str = _option("", "Folder with the sources of the MMEB-V2 mix; empty: do not train on it.")
    mmeb_sources: list[str] = _option([], "Sources of the mix; all 25 by default.")
    max_rows: int | None = _option(None, "First rows of each MMEB source only.")
    on_error: str = _option("skip", "Broken rows: skip or raise.")
    check_media: str = _option("decode", "decode: read every file to its end once; header: parse headers only.")
    check_processes: int = _option(1, "Processes that check the data.")
    recheck: bool = _option(False, "Check again what was checked before.")
    mix: str = _option("weighted", "Sources: weighted (by their weights), proportional (to size) or round_robin.")
    block_size: int = _option(0, "Rows that come from one source in a row; a multiple of the batch size; 0: a batch.")
    distinct: bool = _option(False, "No query or positive twice in a batch. Not for label sets.")
    hard_negatives: str = _option("none", "none, data (columns of the data) or mine (nearest other positives).")
    num_negatives: int = _option(1, "Mined negatives per pair.")
    miner: str = _option("", "Embedder that mines: a trained one, name or path.")
    validation_size: int = _option(200, "Validation rows held out per source, at most a tenth; 0: none.")
    validation_suite: str = _option("", "mini: also score the validation split of the mini suite.")


@dataclass
class ModelSettings:
    """What is built and which parameters train."""

    _argument_group_name = "model"
    backbone: str = _option("", "Decoder-only (multimodal) language model: hub name or path.")
    num_btoks: int = _option(4, "K.")
    readout: str = _option("mean", "mean, last, or attention (the model then needs st_btok to load).")
    template: str = _option("chat", "chat or plain (the authors' layout).")
    max_seq_length: int | None = _option(None, "Longest input in tokens.")
    min_pixels: int | None = _option(None, "Smallest image area.")
    max_pixels: int | None = _option(None, "Largest image area.")
    dtype: str = _option("float32", "Type of the weights.")
    attn_implementation: str | None = _option(None, "Attention of the backbone.")
    tuning: str = _option("lora", "lora, dora or full.")
    lora_r: int = _option(16, "Rank.")
    lora_alpha: int = _option(32, "Scale; the update is alpha / r times the product.")
    lora_dropout: float = _option(0.05, "Dropout on the adapter's input.")


@dataclass
class LossSettings:
    """What is optimised."""

    _argument_group_name = "loss"
    scale: float = _option(50.0, "Inverse temperature.")
    condensation_weight: float = _option(0.2, "Weight of the condensation part.")
    condensation_steps: int | None = _option(None, "Steps that it is on for; always by default.")
    target: str = _option("", "Generated side: auto, query, positive, both, self, none; empty: each source's own.")
    max_target_tokens: int = _option(64, "Longest target.")
    route: str = _option("auto", "How the target reaches the BToks: auto, or a route of BTokLoss.")
    false_negative_margin: float | None = _option(None, "Drop negatives that score above the positive by this margin.")
    # GradCache by default: 64 pairs with pictures don't fit most cards at once. Equal in value and gradients.
    mini_batch_size: int = _option(8, "Rows in memory at a time (GradCache); 0: the whole batch at once, faster.")
    gather_across_devices: bool = _option(False, "Negatives from all processes.")


@dataclass
class TrainerSettings(SentenceTransformerTrainingArguments):
    """The Trainer's own arguments, with defaults for contrastive training."""

    _argument_group_name = "training arguments of sentence-transformers and transformers"
    # Every pair has batch - 1 negatives: 7 at the Trainer's default of 8, next to no signal at temperature 0.02.
    per_device_train_batch_size: int = _option(64, "Pairs a step and device; each is the negative of the others.")
    # A tenth of the steps: at temperature 0.02 the first gradients are the largest of all.
    warmup_steps: float = _option(0.1, "Steps of warm-up; below 1 a share of all steps.")
    # A few hundred steps are a usual training; the Trainer's default of 500 would log it once or never.
    logging_steps: float = _option(10, "Log both parts of the loss every so many steps; below 1 a share of all steps.")
    logging_first_step: bool = _option(True, "Log the first step too: where the loss starts.")
    # What training gained can only be said against what was there.
    eval_on_start: bool = _option(True, "Score the held-out rows before the first step.")


@dataclass
class TrainConfig(RunSettings, DataSettings, ModelSettings, LossSettings, TrainerSettings):
    """Settings of a training: ours and sentence-transformers' training arguments."""

    def __post_init__(self) -> None:
        """Check the choices before anything is loaded."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.hard_negatives == "mine" and not self.miner:
            raise ValueError("--hard_negatives mine needs --miner, a trained embedder: a name or path.")
        if self.stream:
            self._check_stream()
        if not (self.validation_size or self.validation_suite):
            self.eval_on_start = False  # there is nothing to score
            if self.load_best_model_at_end:
                raise ValueError("--load_best_model_at_end needs --validation_size or --validation_suite.")
        elif self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "sequential_score"  # the Trainer's own choice, a loss, is not computed here
        super().__post_init__()

    def _check_stream(self) -> None:
        if self.max_steps <= 0:
            raise ValueError("--stream needs --max_steps: nobody knows how many rows there are.")
        others = {
            "mmeb_root": self.mmeb_root,
            "hard_negatives mine": self.hard_negatives == "mine",
            "distinct": self.distinct,
        }
        for name, given in others.items():
            if given:
                raise ValueError(f"--stream reads --data row by row and can't be used with --{name}.")
        if not self.data:
            raise ValueError("--stream needs --data: files, patterns such as 'shards/*.tar', or hub names.")

    def to_dict(self) -> dict[str, Any]:
        """The settings for the model card, without places: cards get published."""
        return {name: value for name, value in super().to_dict().items() if name not in ("data", "mmeb_root")}

    def model_prompts(self) -> dict[str, str]:
        """What `prompts` means for the saved model: `query` and `document`, which `encode_query` and others look for.

        Prompts by data set and column that agree in all data sets are one prompt; others are kept as `name-column`.
        """
        given = self.prompts or {}
        if isinstance(given, str):
            return {"query": given, "document": given}
        found: dict[str, str] = {}
        for name, prompt in given.items():
            if isinstance(prompt, str) and (name in _ROLES or name.startswith("negative")):
                found.setdefault(_ROLES.get(name, "document"), prompt)
            elif isinstance(prompt, str):
                found[name] = prompt
            else:
                found.update({f"{name}-{_ROLES.get(column, column)}": text for column, text in prompt.items()})
        for role in ("query", "document"):
            texts = {text for name, text in found.items() if name.endswith(f"-{role}")}
            if len(texts) == 1:
                found = {name: text for name, text in found.items() if not name.endswith(f"-{role}")}
                found[role] = texts.pop()
        return found


_ROLES = {"query": "query", "positive": "document"}


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The command line over the preset it names over the defaults."""
    groups = (RunSettings, DataSettings, ModelSettings, LossSettings, TrainerSettings)
    parser = HfArgumentParser(
        groups, usage="python -m recipes.train --backbone NAME --data pairs.jsonl --output_dir out [further settings]"
    )
    named, _ = parser.parse_known_args(arguments)
    if named.preset not in CHOICES["preset"]:
        parser.error(f"--preset must be one of {list(PRESETS)}, got {named.preset!r}")
    parser.set_defaults(**PRESETS.get(named.preset, {}))
    return TrainConfig(**vars(parser.parse_args(arguments)))
