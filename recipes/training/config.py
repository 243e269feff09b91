"""Settings of `recipes.train` as one object: ours beside all training arguments of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments

from recipes.command_line import Parser
from recipes.training.presets import PRESETS
from recipes.training.settings import (
    DataSettings,
    LossSettings,
    ModelSettings,
    RunSettings,
    TrainerDefaults,
    check_choices,
    check_shares,
)


@dataclass
class TrainerSettings(TrainerDefaults, SentenceTransformerTrainingArguments):
    """The Trainer's own arguments, with defaults for contrastive training."""


@dataclass
class TrainConfig(RunSettings, DataSettings, ModelSettings, LossSettings, TrainerSettings):
    """Settings of a training: ours and sentence-transformers' training arguments."""

    def __post_init__(self) -> None:
        """Check the choices before anything is loaded."""
        check_choices(self)
        check_shares(self)
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

    def model_prompts(self, sources: Sequence[str] = ()) -> dict[str, str]:
        """What `prompts` means for the saved model: `query` and `document`, which `encode_query` and others look for.

        Saved is what is trained with: the prompt of queries, and that of positives, if it is the same in all data
        sets; else those of single data sets, as `name-query` and `name-document`.

        Args:
            sources: Names of all data sets. Default: those that `prompts` names.
        """
        given = self.prompts or {}
        if isinstance(given, str):
            return {"query": given, "document": given}
        is_column = {name: name in _ROLES or name.startswith("negative") for name in given}
        named = [name for name in given if name in sources or not is_column[name]]
        found: dict[str, str] = {}
        for side, role in _ROLES.items():
            texts = {source: self.prompt_of(source, side) for source in sources or named or [""]}
            meant = [name for name, prompt in given.items() if name == side or (name in named and _says(prompt, side))]
            if meant and len(set(texts.values())) == 1:
                found[role] = next(iter(texts.values()))
            elif meant:
                found |= {f"{source}-{role}": text for source, text in texts.items() if text}
        return found

    def prompt_of(self, source: str, side: str) -> str:
        """The prompt that a side of a source is trained with, as sentence-transformers reads `prompts`."""
        given: Any = self.prompts or ""
        if isinstance(given, dict):
            given = given.get(source, given)
        if isinstance(given, dict):
            given = given.get(side)
        return given if isinstance(given, str) else ""

    def check_prompts(self, sources: Mapping[str, Sequence[str]]) -> None:
        """Refuse prompts for what is not there: they would be saved, and never trained with.

        Args:
            sources: The columns of each source by its name.

        Raises:
            ValueError: A key that names neither a source nor a column.
        """
        columns = {column for names in sources.values() for column in names}
        if self.stream and isinstance(self.prompts, dict):  # all sources are one stream of rows, without their names
            others = [name for name, prompt in self.prompts.items() if name not in columns or isinstance(prompt, dict)]
            if others:
                raise ValueError(
                    f"--prompts must name columns with --stream, but {others} are none: there are {sorted(columns)}. "
                    "Use these names, each with one prompt for all data sets."
                )
            return
        wrong = []
        for name, prompt in self.prompts.items() if isinstance(self.prompts, dict) else ():
            if name in sources and isinstance(prompt, dict):
                wrong += [column for column in prompt if column not in sources[name]]
            elif name not in sources and (name not in columns or isinstance(prompt, dict)):
                wrong.append(name)
        if wrong:
            raise ValueError(
                f"--prompts must name data sets or columns, but {wrong} are none: there are the data sets "
                f"{list(sources)} with the columns {sorted(columns)}. Use these names."
            )


_ROLES = {"query": "query", "positive": "document"}


def _says(prompt: Any, side: str) -> bool:
    """Whether the prompts of a data set hold one for a side."""
    return isinstance(prompt, str) or side in prompt


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The command line over the preset it names over the defaults."""
    parser = Parser((RunSettings, DataSettings, ModelSettings, LossSettings, TrainerSettings))
    lengths = {name: parser.get_default(name) for name in ("num_train_epochs", "max_steps")}
    parser.set_defaults(**dict.fromkeys(lengths))
    named, _ = parser.parse_known_args(arguments)
    preset = dict(PRESETS.get(named.preset, {}))
    if named.num_train_epochs is not None and named.max_steps is None:
        preset.pop("max_steps", None)  # of the preset, which would win over the epochs that were asked for
    parser.set_defaults(**lengths | preset)
    return parser.settings(TrainConfig, arguments)
