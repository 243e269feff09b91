"""What each part of the method is worth on the quickstart's task: learning curves over variants, paired over seeds.

    python -m recipes.ablation --seeds 3

Every variant trains on the same pairs in the same order for each seed, from the shipped backbone, and is scored on the
*validation* words after each number of steps in `score_at`. Finished runs are kept in `runs.jsonl` and not repeated.
Writes `ablation.md` (MRR, and the paired difference to last-token pooling) and `ablation.png`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from sentence_transformers import SentenceTransformer
from transformers import HfArgumentParser, TrainerCallback

from recipes.paired import Search, measures
from recipes.quickstart import QuickstartConfig, settings_of
from recipes.toy import pairs
from recipes.twins import Twin, quiet, train_twin

BASELINE = "last token"
# The rows of the BToks start the same in every run (seed 0); 16 steps are 40 % of the default.
VARIANTS = {
    BASELINE: Twin("lasttoken"),
    "BToks, weight 0": Twin("btok", {"seed": 0, "condensation_weight": 0.0}),
    "BToks, weight 0.2": Twin("btok", {"seed": 0, "condensation_weight": 0.2}),
    "BToks, weight 1": Twin("btok", {"seed": 0, "condensation_weight": 1.0}),
    "BToks, weight 5 for 40 % of the steps": Twin(
        "btok", {"seed": 0, "condensation_weight": 5.0, "condensation_steps": 16}
    ),
    "one BTok, weight 0.2": Twin("btok", {"seed": 0, "num_btoks": 1, "condensation_weight": 0.2}),
}


@dataclass
class AblationConfig:
    """Settings of the study."""

    output: str = field(default="recipes/results", metadata={"help": "Folder of runs, table and figure."})
    seeds: int = field(default=3, metadata={"help": "Seeds 0 to N-1 for each variant."})
    steps: int = field(default=40, metadata={"help": "Training steps of a run."})
    score_at: str = field(default="20,40", metadata={"help": "Steps after which a run is scored."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate, the same for all variants."})
    candidates: int = field(default=561, metadata={"help": "Words to search among; the validation split has 561."})
    variants: str = field(default="", metadata={"help": "Only variants whose name holds this text."})


class Scorer(TrainerCallback):
    """Scores the model in training after certain steps."""

    def __init__(self, model: SentenceTransformer, searches: list[Search], steps: set[int], scores: dict) -> None:
        self.model, self.searches, self.steps, self.scores = model, searches, steps, scores

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each update."""
        if state.global_step in self.steps:
            training = self.model.training
            self.scores[str(state.global_step)] = {
                search.name: measures(search.ranks(self.model)) for search in self.searches
            }
            self.model.train(training)


def run_all(config: AblationConfig) -> list[dict[str, Any]]:
    """Train and score what is not in `runs.jsonl` yet; all runs."""
    path = Path(config.output) / "runs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    shared = {"steps": config.steps, "learning_rate": config.learning_rate, "candidates": config.candidates}
    searches = pairs.searches("validation", config.candidates)
    base = QuickstartConfig(steps=config.steps, learning_rate=config.learning_rate)
    chosen = {name: twin for name, twin in VARIANTS.items() if config.variants in name}
    for seed in range(config.seeds):
        data = pairs.train_dataset(config.steps * base.batch_size // 2, seed)
        for name, twin in chosen.items():
            key = {"variant": name, "seed": seed, **shared}
            if any(key.items() <= run.items() for run in runs):
                continue
            scores: dict[str, Any] = {}
            steps = {int(step) for step in config.score_at.split(",")}
            scorer = partial(Scorer, searches=searches, steps=steps, scores=scores)
            title = f"{name}, seed {seed}"
            train_twin(name, twin, settings_of(base), seed, data, [], title, lambda model, make=scorer: [make(model)])
            print(
                title, {task: round(found["MRR"], 1) for task, found in list(scores.values())[-1].items()}, flush=True
            )
            runs.append({**key, "scores": scores})
            with path.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    return [run for run in runs if shared.items() <= run.items()]


def curves(runs: list[dict[str, Any]], task: str) -> dict[str, dict[int, np.ndarray]]:
    """MRR in per cent: variant -> step -> one value per seed, seeds in order."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name in VARIANTS:
        mine = sorted((run for run in runs if run["variant"] == name), key=lambda run: run["seed"])
        if mine:
            steps = [int(step) for step in mine[0]["scores"]]
            found[name] = {s: np.array([run["scores"][str(s)][task]["MRR"] for run in mine]) for s in steps}
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: mean MRR ± half the range over seeds; in brackets the paired difference to last-token pooling."""
    tasks = list(next(iter(runs[0]["scores"].values())))
    lines = []
    for task in tasks:
        found = curves(runs, task)
        steps = list(next(iter(found.values())))
        lines += [
            f"| {task} | " + " | ".join(f"{step} steps" for step in steps) + " |",
            "|---|" + "---:|" * len(steps),
        ]
        for name, values in found.items():
            cells = []
            for step in steps:
                mrr = values[step]
                cell = f"{mrr.mean():.1f} ± {np.ptp(mrr) / 2:.1f}"
                if name != BASELINE and BASELINE in found:
                    paired = mrr - found[BASELINE][step][: len(mrr)]
                    cell += f" ({paired.mean():+.1f}, {paired.min():+.1f} to {paired.max():+.1f})"
                cells.append(cell)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """MRR over steps, one panel per task, a line per variant with the range over seeds."""
    tasks = list(next(iter(runs[0]["scores"].values())))
    figure, axes = plt.subplots(1, len(tasks), figsize=(13, 4.8), layout="constrained", sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for number, (name, values) in enumerate(curves(runs, task).items()):
            steps, means = list(values), [v.mean() for v in values.values()]
            spread = [
                means - np.array([v.min() for v in values.values()]),
                [v.max() for v in values.values()] - np.array(means),
            ]
            style = "k--" if name == BASELINE else f"C{number}"
            axis.errorbar(
                steps, means, yerr=spread, fmt=style + ("" if name == BASELINE else "-"), capsize=3, label=name
            )
        axis.set(title=task, xlabel="training steps", xticks=steps)
    axes[0].set_ylabel("MRR on validation words, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the study and write its table and figure."""
    (config,) = HfArgumentParser(AblationConfig).parse_args_into_dataclasses()
    quiet()
    runs = run_all(config)
    text = table(runs)
    (Path(config.output) / "ablation.md").write_text(text)
    draw(runs, Path(config.output) / "ablation.png")
    print(text)


if __name__ == "__main__":
    main()
