"""The study: what each part of the method is worth on real pairs.

    python -m recipes.study --quick
    python -m recipes.study --backbones smollm2:12 --corpora packages words --seeds 5 --rates 3e-4 1e-3 3e-3

For every backbone, corpus and arm: the best learning rate on validation (where several are given), then every seed on
the test split at equal steps, then, for arms whose steps cost more or less than the baseline's, at equal time. The
plan and its estimated time are printed first. Stop it and start it again: it goes on. `--only table` writes the tables
and figures again from `runs.jsonl`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from recipes.data.debian import CORPORA
from recipes.data.real import DEFAULT_CACHE
from recipes.restarts import only_training_in
from recipes.study import report
from recipes.study.arms import ARMS, BASELINE, HEADLINES
from recipes.study.inputs import Corpus, backbone_folder, load_corpus
from recipes.study.runs import Log, Wanted, best_rate, equal_time_steps, factor, make_run, mean_reciprocal_ranks
from recipes.twins import TwinSettings, quiet

QUICK: dict[str, Any] = {
    "backbones": ["shipped"],
    "corpora": ["languages", "packages"],
    "arms": HEADLINES,
    "seeds": 2,
    "steps": 20,
    "limit": 1500,
    "candidates": 150,
}


def _option(default: Any, text: str) -> Any:
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text}, **make)


@dataclass
class StudyConfig:
    """Settings of the study."""

    to: str = _option("study", "Folder of runs, tables, figures, corpora and cut backbones.")
    quick: bool = _option(False, "The headline arms on the shipped backbone and two corpora, in about 15 minutes.")
    only: str = _option("", "plan: print the plan and stop; table: write tables and figures from what was run.")
    backbones: list[str] = _option(["smollm2:12"], "shipped, smollm2, smollm2:LAYERS, or a name or path.")
    corpora: list[str] = _option(["packages", "words", "languages@250"], f"{', '.join(CORPORA)}; NAME@N: N pairs.")
    arms: list[str] = _option(list(ARMS), f"Of: {', '.join(ARMS)}. The baseline is always run.")
    seeds: int = _option(2, "Seeds 0 to N-1 of each arm; 5 for finals.")
    steps: int = _option(100, "Training steps of a run.")
    rates: list[float] = _option([1e-3], "Peak learning rates; of several the best on validation, for each arm.")
    rate_steps: int = _option(50, "Training steps of a run that chooses a rate.")
    batch_size: int = _option(32, "Pairs a step.")
    tuning: str = _option("lora", "lora or full.")
    max_seq_length: int = _option(64, "Longest text in tokens.")
    equal_time: bool = _option(True, "Also run every arm for the baseline's time.")
    limit: int = _option(4000, "Pairs read of each corpus.")
    candidates: int = _option(400, "Pairs searched.")
    cache: str = _option(str(DEFAULT_CACHE), "Unpacked packages.")
    device: str | None = _option(None, "cpu, cuda, ...; by default what is there.")

    def __post_init__(self) -> None:
        """Refuse what can't run before anything is loaded."""
        if self.only not in ("", "plan", "table"):
            raise ValueError(f"only must be plan or table, got {self.only!r}.")
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"arms must be of {list(ARMS)}, got {unknown}.")
        if unknown := [name for name in self.corpora if name.partition("@")[0] not in CORPORA]:
            raise ValueError(f"corpora must be of {list(CORPORA)}, got {unknown}.")
        if self.quick:
            for name, value in QUICK.items():
                setattr(self, name, value)
        # In the order of the table, and the baseline first: every other arm is measured against it.
        self.arms = [arm for arm in ARMS if arm in {BASELINE, *self.arms}]


class Study:
    """Everything that is to be run, in its order.

    Args:
        config: The settings.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.folder = Path(config.to)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.folder / "runs.jsonl")

    def wanted(self, backbone: str, corpus: str, arm: str, seed: int, **other: Any) -> Wanted:
        """A run of the configured length."""
        config = self.config
        run = Wanted(backbone, corpus, arm, seed, config.rates[0], config.steps, config.batch_size, "test")
        return replace(run, **other)

    def stages(self, backbone: str, corpus: str) -> Iterator[Callable[[str], list[Wanted]]]:
        """Runs of an arm, a stage at a time: each depends on what the one before found."""

        def rates(arm: str) -> list[Wanted]:
            if len(self.config.rates) == 1:
                return []
            steps = self.config.rate_steps
            trial = self.wanted(backbone, corpus, arm, 0, steps=steps, split="validation")
            return [replace(trial, rate=rate) for rate in self.config.rates]

        def at_best(arm: str, seed: int) -> Wanted:
            trial = self.wanted(backbone, corpus, arm, 0, steps=self.config.rate_steps, split="validation")
            rate = best_rate(self.log, trial, self.config.rates)
            return self.wanted(backbone, corpus, arm, seed, rate=rate or self.config.rates[0])

        def timed(arm: str, seed: int) -> list[Wanted]:
            steps = equal_time_steps(self.log, at_best(arm, 0), at_best(BASELINE, 0))
            return [replace(at_best(arm, seed), steps=steps)] if steps else []

        yield rates
        for seed in range(self.config.seeds):  # a seed of every arm before the next: comparable whenever it is stopped
            yield lambda arm, seed=seed: [at_best(arm, seed)]
        for seed in range(self.config.seeds if self.config.equal_time else 0):
            yield lambda arm, seed=seed: timed(arm, seed)

    def plan(self) -> str:
        """How many runs are left and about how long they take."""
        left, seconds, unknown = 0, 0.0, 0
        for backbone in self.config.backbones:
            for corpus in self.config.corpora:
                for stage in self.stages(backbone, corpus):
                    for arm in self.config.arms:
                        for run in stage(arm):
                            if self.log.find(run) is None:
                                left += 1
                                pace = self.pace(run)
                                seconds += run.steps * pace
                                unknown += pace == 0
        known = f", about {seconds / 60:.0f} minutes of processor time" if seconds else ""
        more = f" and {unknown} whose pace is not measured yet" if unknown else ""
        done = len(self.log.lines)
        return f"{done} runs are there, {left} are to be made{known}{more}; those at equal time come later."

    def pace(self, run: Wanted) -> float:
        """Expected seconds a step, from runs of the same backbone and corpus; 0 where there are none."""
        known = [
            line["seconds_a_step"] / factor(ARMS[line["arm"]]) * factor(ARMS[run.arm])
            for line in self.log.lines
            if (line["backbone"], line["corpus"]) == (run.backbone, run.corpus)
        ]
        return sum(known) / len(known) if known else 0.0

    def run(self) -> None:
        """Make every run that is missing."""
        print(self.plan(), flush=True)
        for backbone in self.config.backbones:
            path = backbone_folder(backbone, self.folder)
            for name in self.config.corpora:
                corpus: Corpus | None = None
                for stage in self.stages(backbone, name):
                    for arm in self.config.arms:
                        for wanted in stage(arm):
                            if self.log.find(wanted) is None:
                                corpus = corpus or self.corpus(name)
                                self.one(wanted, path, corpus)

    def corpus(self, name: str) -> Corpus:
        """A corpus with its searches."""
        config = self.config
        return load_corpus(name, self.folder / "corpora", Path(config.cache), config.limit, config.candidates)

    def one(self, wanted: Wanted, path: str, corpus: Corpus) -> None:
        """Make a run, write its line, and say how it went."""
        config = self.config
        build: dict[str, Any] = {"max_seq_length": config.max_seq_length}
        settings = TwinSettings(path, wanted.steps, tuning=config.tuning, build=build, device=config.device)
        title = f"{wanted.backbone}, {wanted.corpus}, {wanted.arm}, seed {wanted.seed}"
        start = time.perf_counter()
        line = make_run(wanted, settings, corpus, title)
        self.log.add(line)
        score = mean_reciprocal_ranks(line).mean()
        seconds = time.perf_counter() - start
        print(
            f"{title}: {wanted.steps} steps at {wanted.rate:g}, MRR {score:.1f} ({wanted.split}), {seconds:.0f} s. "
            f"{self.plan()}",
            flush=True,
        )

    def write(self) -> str:
        """Write tables and figures; the tables."""
        groups = report.groups_of(self.log.lines)
        if not groups:
            raise ValueError(f"{self.log.path} has no run on a test split yet.")
        text = report.table(groups)
        if why := report.reasons(self.log.lines):
            text += f"\n\n### Why\n\n{why}\n"
        (self.folder / "study.md").write_text(text + "\n", encoding="utf-8")
        report.draw(groups, self.folder / "study.png")
        report.draw_curves(groups, self.folder / "curves.png")
        return text


def main() -> None:
    """Run the study with the settings of the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    (config,) = HfArgumentParser(StudyConfig).parse_args_into_dataclasses()
    quiet()
    study = Study(config)
    if config.only == "plan":
        print(study.plan())
        return
    if not config.only:
        with only_training_in(config.to):
            study.run()
    print("\n" + study.write())
    print(f"\n{config.to}/study.md, {config.to}/study.png, {config.to}/curves.png, {config.to}/runs.jsonl")


if __name__ == "__main__":
    main()
