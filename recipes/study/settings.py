"""What the study can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.command_line import option
from recipes.data.debian import CORPORA
from recipes.data.real import DEFAULT_CACHE
from recipes.study.variants import BASELINE, HEADLINES, VARIANTS, current_name

QUICK: dict[str, Any] = {
    "backbones": ["shipped"],
    "corpora": ["languages", "packages"],
    "variants": HEADLINES,
    "seeds": 2,
    "steps": 20,
    "limit": 1500,
    "candidates": 150,
}

# The same for pictures, on the model that sees them.
QUICK_PICTURES: dict[str, Any] = {
    "backbones": ["seeing"],
    "variants": [BASELINE, "last token, prompt", "topic start", "topic start, condensation 0.2"],
    "seeds": 1,
    "steps": 10,
    "batch_size": 16,
    "max_seq_length": 512,
    "equal_time": False,
}
PICTURES = {"stamps", "clipart", "emoji"}


@dataclass
class StudyConfig:
    """Settings of the study."""

    output_dir: str = option("study", "Folder of runs, tables, figures, corpora and cut backbones.", "--to")
    quick: bool = option(False, "A few variants: two corpora of texts, or what pictures --corpora names; 15 minutes.")
    only: str = option("", "plan: print it and stop; costs: time the variants and stop; table: from what was run.")
    backbones: list[str] = option(["smollm2:12"], "shipped, smollm2[:LAYERS or :chat], seeing, a name or path.")
    corpora: list[str] = option(["packages", "words", "languages@250"], f"{', '.join(CORPORA)}; NAME@N: N pairs.")
    variants: list[str] = option(list(VARIANTS), f"Of: {', '.join(VARIANTS)}. The baseline is always run.", "--arms")
    seeds: int = option(2, "Seeds 0 to N-1 of each variant; 5 for finals.")
    steps: int = option(100, "Training steps of a run; 0: untrained models.")
    workers: int = option(1, "Runs at a time, each in a process of its own: for a GPU with room for several.")
    cost_rounds: int = option(2, "How often a step of every variant is timed, for the runs at equal time.")
    rates: list[float] = option([1e-3], "Peak learning rates; of several the best on validation, for each variant.")
    rate_steps: int = option(50, "Training steps of a run that chooses a rate.")
    batch_size: int = option(32, "Pairs a step.")
    tuning: str = option("lora", "lora or full.")
    dtype: str = option("float32", "Type of the weights; bfloat16 for untrained models, --steps 0, only.")
    bf16: bool = option(False, "Products of a training in bfloat16, weights in float32: where the processor has it.")
    max_seq_length: int = option(64, "Longest text in tokens.")
    equal_time: bool = option(True, "Also run every variant for the baseline's time.")
    limit: int = option(4000, "Pairs read of each corpus.")
    candidates: int = option(400, "Pairs searched.")
    cache: str = option(str(DEFAULT_CACHE), "Unpacked packages.")
    device: str | None = option(None, "cpu, cuda, ...; by default what is there.")

    def __post_init__(self) -> None:
        """Refuse what can't run before anything is loaded."""
        if self.only not in ("", "plan", "costs", "table"):
            raise ValueError(f"only must be plan, costs or table, got {self.only!r}.")
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0 (untrained models), got {self.steps}.")
        if self.dtype != "float32" and self.steps:
            raise ValueError(f"training needs float32 weights, got dtype {self.dtype!r}: it is for --steps 0.")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}.")
        if unknown := [name for name in self.variants if current_name(name) not in VARIANTS]:
            raise ValueError(f"variants must be of {list(VARIANTS)}, got {unknown}.")
        if unknown := [name for name in self.corpora if name.partition("@")[0] not in CORPORA]:
            raise ValueError(f"corpora must be of {list(CORPORA)}, got {unknown}.")
        if self.quick:
            seen = PICTURES.intersection(name.partition("@")[0] for name in self.corpora)
            for name, value in (QUICK_PICTURES if seen else QUICK).items():
                setattr(self, name, value)
        # In the order of the table, and the baseline first: every other one is measured against it.
        wanted = {BASELINE, *map(current_name, self.variants)}
        self.variants = [name for name in VARIANTS if name in wanted]
