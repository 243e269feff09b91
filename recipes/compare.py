"""Do bottleneck tokens help on your own data? Variants trained on the same pairs, compared query by query.

    python -m recipes.compare --data pairs.jsonl --backbone Qwen/Qwen2-VL-2B-Instruct --output comparison
    python -m recipes.compare --data pairs.jsonl --backbone X --poolings btok btok:condensation_weight=0 lasttoken \
        --seeds 5 --steps 200 --equal time

1. Reads and checks the pairs (formats: `data/user_data.py`) and holds out queries that share no content with the rest.
2. For every seed and pooling: builds the model, scores it untrained, trains it, scores it again, in both directions.
   All poolings of a seed see the same batches in the same order. `--equal steps` gives each `--steps` steps;
   `--equal time` gives each the time that the baseline takes for `--steps` steps (measured on a few steps first).
3. Writes `comparison.md` (MRR before and after, paired differences to the baseline with 95 % intervals over seeds and
   queries, cost of a step) and `comparison.png`.

Every finished training is a line of `runs.jsonl` in the output folder; the same command goes on from there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import HfArgumentParser

from recipes.data.holdout import hold_out
from recipes.data.searches import Search, searches_of
from recipes.data.training_pairs import Source
from recipes.data.user_data import load_user_data
from recipes.research.significance import Run, draw, table
from recipes.research.variants import Variant, VariantSettings, quiet, train_variant
from recipes.training.resume import identity_of, only_training_in

CALIBRATION = 8  # steps; the median of their times decides how many fit the baseline's time


def _option(default: Any, text: str) -> Any:
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text}, **make)


@dataclass
class CompareConfig:
    """Settings of a comparison."""

    data: list[str] = _option([], "Your pairs: files, folders or hub names.")
    backbone: str = _option("", "Decoder-only (multimodal) language model: hub name or path.")
    output: str = _option("comparison", "Folder of runs, table and figure.")
    poolings: list[str] = _option(
        ["btok", "lasttoken", "mean"],
        "btok, lasttoken, mean; options of build_model and the loss behind a colon: btok:readout=last,num_btoks=1.",
    )
    baseline: str = _option("lasttoken", "The pooling that the others are compared with.")
    seeds: int = _option(3, "Seeds 0 to N-1 for each pooling.")
    steps: int = _option(100, "Training steps of a run (of the baseline, with --equal time).")
    equal: str = _option("steps", "steps or time: what all poolings get the same amount of.")
    batch_size: int = _option(32, "Pairs a step; each is the negative of the others.")
    mini_batch_size: int = _option(0, "Rows in memory at a time (GradCache); 0: the whole batch at once.")
    learning_rate: float = _option(5e-5, "Peak learning rate, the same for all.")
    tuning: str = _option("lora", "lora or full.")
    validation_share: float = _option(0.2, "Largest share of the pairs that is held out.")
    validation_size: int = _option(1000, "Most pairs that are held out.")
    max_seq_length: int | None = _option(None, "Longest input in tokens.")
    dtype: str = _option("float32", "Type of the weights.")
    bf16: bool = _option(False, "Autocast to bfloat16.")
    device: str | None = _option(None, "cpu, cuda, ...; by default what is there.")

    def __post_init__(self) -> None:
        """Refuse what can't run before anything is loaded."""
        if not self.data or not self.backbone:
            raise ValueError("pass --data (your pairs) and --backbone (a model name or path).")
        if self.equal not in ("steps", "time") or self.tuning not in ("lora", "full"):
            raise ValueError(f"equal must be steps or time, tuning lora or full, got {self.equal!r}, {self.tuning!r}.")
        if self.baseline not in self.poolings:
            raise ValueError(f"--baseline {self.baseline} must be one of --poolings {self.poolings}.")
        for text in self.poolings:
            Variant.parse(text)


def compare(config: CompareConfig) -> str:
    """Train and score what is not in `runs.jsonl` yet; write table and figure.

    Args:
        config: The settings.

    Returns:
        The table.
    """
    with only_training_in(config.output):
        sources = load_user_data(config.data)
        sources = [source.without_negatives() for source in sources]
        training, held_out = hold_out(sources, config.validation_size, share=config.validation_share)
        if not held_out:
            raise ValueError("nothing could be held out, so nothing can be compared; see the warnings above.")
        searches = [search for source in held_out for search in searches_of(source, config.batch_size)]
        print(
            f"{sum(len(source.pairs) for source in training)} pairs train, "
            f"{sum(len(source.pairs) for source in held_out)} are held out; {len(config.poolings)} poolings x "
            f"{config.seeds} seeds.",
            flush=True,
        )
        runs = run_all(config, training, searches)
        order = {pooling: place for place, pooling in enumerate(config.poolings)}
        runs = sorted(runs, key=lambda run: (order[run.pooling], run.seed))
        text = table(runs, config.baseline, {search.name: len(search.documents) for search in searches})
        output = Path(config.output)
        (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
        draw(runs, output / "comparison.png")
    return text


def run_all(config: CompareConfig, training: Sequence[Source], searches: Sequence[Search]) -> list[Run]:
    """Every run, from `runs.jsonl` where it has one with these settings and these data."""
    shared = {name: value for name, value in asdict(config).items() if name not in _FREE}
    identity = identity_of(training, config.backbone, shared)
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(config.output) / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = [line for line in lines if line["key"] == key]
    data = DatasetDict({source.name: source.dataset() for source in training})
    same = ("backbone", "steps", "batch_size", "mini_batch_size", "learning_rate", "tuning", "device", "bf16")
    build = {"max_seq_length": config.max_seq_length, "model_kwargs": {"dtype": getattr(torch, config.dtype)}}
    settings = VariantSettings(**{name: getattr(config, name) for name in same}, build=build)
    steps = _steps(config, settings, data, known, path, key)
    runs = []
    wanted = [(seed, pooling) for seed in range(config.seeds) for pooling in config.poolings]
    for number, (seed, pooling) in enumerate(wanted, start=1):
        found = [line for line in known if line.get("seed") == seed and line["pooling"] == pooling]
        if found:
            runs.append(Run.from_json(found[0]))
            continue
        own = replace(settings, steps=steps[pooling])
        title = f"{pooling}, seed {seed} ({number} of {len(wanted)})"
        model, run = train_variant(pooling, Variant.parse(pooling), own, seed, data, searches, title)
        del model
        runs.append(run)
        _append(path, {"key": key, **run.to_json()})
        gains = [
            f"{100 * (1 / run.before[s.name]).mean():.1f} to {100 * (1 / run.after[s.name]).mean():.1f}"
            for s in searches
        ]
        print(f"{title}: {run.steps} steps in {run.train_seconds:.0f} s, MRR {', '.join(gains)}", flush=True)
    return runs


# What a run does not depend on: more seeds or poolings may be added to a finished comparison.
_FREE = ("data", "backbone", "output", "poolings", "baseline", "seeds")


def _steps(
    config: CompareConfig, settings: VariantSettings, data: DatasetDict, known: list[dict], path: Path, key: str
) -> dict[str, int]:
    """Steps of each pooling: the same, or as many as fit the time of the baseline's."""
    if config.equal == "steps":
        return dict.fromkeys(config.poolings, config.steps)
    pace = {line["pooling"]: line["pace"] for line in known if "pace" in line}
    for pooling in config.poolings:
        if pooling not in pace:
            short = replace(settings, steps=CALIBRATION)
            _, run = train_variant(pooling, Variant.parse(pooling), short, 0, data, [], f"{pooling}: pace")
            pace[pooling] = run.step_seconds
            _append(path, {"key": key, "pooling": pooling, "pace": run.step_seconds})
    return {
        pooling: max(1, round(config.steps * pace[config.baseline] / pace[pooling])) for pooling in config.poolings
    }


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Compare with the settings of the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    (config,) = HfArgumentParser(CompareConfig).parse_args_into_dataclasses()
    quiet()
    print("\n" + compare(config))
    print(f"\n{config.output}/comparison.md, {config.output}/comparison.png, {config.output}/runs.jsonl")


if __name__ == "__main__":
    main()
