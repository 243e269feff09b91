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


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The command line over the preset it names over the defaults."""
    parser = Parser((RunSettings, DataSettings, ModelSettings, LossSettings, TrainerSettings))
    named, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**PRESETS.get(named.preset, {}))
    return parser.settings(TrainConfig, arguments)
