"""The study: what is to be run, in its order, and the tables of what was run."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from recipes.research.variants import quiet
from recipes.study import report
from recipes.study.costs import Costs
from recipes.study.inputs import backbone_folder
from recipes.study.jobs import Job, made
from recipes.study.runs import Log, Wanted, best_rate, mean_reciprocal_ranks
from recipes.study.settings import StudyConfig
from recipes.study.variants import BASELINE
from recipes.training.resume import only_training_in


class Study:
    """Everything that is to be run, in its order.

    Args:
        config: The settings.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.folder / "runs.jsonl")
        self.costs = Costs(Log(self.folder / "costs.jsonl"))

    def phases(self) -> Iterator[list[Wanted]]:
        """Runs in their order: those that choose rates, then the finals, which depend on what the first found.

        A seed of every variant before the next, at equal steps and at equal time: comparable whenever it is stopped.
        """
        config = self.config
        first = Wanted("", "", "", 0, config.rates[0], config.steps, config.batch_size, "test")
        every = [
            replace(first, backbone=backbone, corpus=corpus, variant=variant)
            for backbone in config.backbones
            for corpus in config.corpora
            for variant in config.variants
        ]
        trials = [replace(run, steps=config.rate_steps, split="validation") for run in every]
        if len(config.rates) > 1:
            yield [replace(trial, rate=rate) for trial in trials for rate in config.rates]
        rates = [best_rate(self.log, trial, config.rates) or config.rates[0] for trial in trials]
        finals = []
        for seed in range(config.seeds):
            runs = [replace(run, seed=seed, rate=rate) for run, rate in zip(every, rates, strict=True)]
            finals += runs
            if config.equal_time:
                timed = [(run, self.costs.equal_time_steps(run)) for run in runs if run.variant != BASELINE]
                finals += [replace(run, steps=steps) for run, steps in timed if steps]
        yield finals

    def missing(self) -> Iterator[list[Wanted]]:
        """The phases without what was made already."""
        for phase in self.phases():
            yield [run for run in phase if self.log.find(asdict(run)) is None]

    def plan(self) -> str:
        """How many runs are left and about how long they take."""
        left, seconds, unknown = 0, 0.0, 0
        for run in itertools.chain.from_iterable(self.missing()):
            left += 1
            pace = self.pace(run)
            seconds += run.steps * pace
            unknown += pace == 0
        known = f", about {seconds / 60:.0f} minutes" if seconds else ""
        more = f" and {unknown} whose pace is not measured yet" if unknown else ""
        return f"{len(self.log.lines)} runs are there, {left} are to be made{known}{more}."

    def pace(self, run: Wanted) -> float:
        """Expected seconds a step: of the variant, else of the backbone and corpus; 0 where nothing was measured."""
        kind = run.corpus.partition("@")[0]
        found = self.costs.seconds(run.backbone, kind, run.variant) or self.costs.seconds(run.backbone, kind, BASELINE)
        return float(np.median(list(found.values()))) if found else 0.0

    def measure(self) -> None:
        """Unpack backbones, make corpora, and time a step of every variant that is not timed yet."""
        config = self.config
        for backbone in config.backbones:
            backbone_folder(backbone, self.folder)  # once, before several processes want it
            for name in config.corpora:
                job = Job(Wanted(backbone, name, BASELINE, 0, config.rates[0], 0, config.batch_size, "test"), config)
                corpus = job.corpus()
                rounds = config.cost_rounds if config.equal_time else 0
                for line in self.costs.measure(backbone, corpus, config.variants, job.settings, rounds):
                    print(line, flush=True)

    def run(self) -> None:
        """Make every run that is missing; a `RuntimeError` at the end if some failed: the others are in the log."""
        failed: list[str] = []
        for phase in self.missing():
            jobs = [Job(run, self.config) for run in phase]
            for done, (job, line) in enumerate(made(jobs, self.config.workers), 1):
                if isinstance(line, Exception):
                    failed.append(f"{job.title}: {line}")
                    found = f"FAILED, {line}"
                else:
                    self.log.add(line)
                    found = f"MRR {mean_reciprocal_ranks(line).mean():.1f} ({line['split']}), {line['seconds']:.0f} s"
                print(f"{done} of {len(jobs)}: {job.title}: {found}", flush=True)
        if failed:
            raise RuntimeError(f"{len(failed)} runs failed. The first: {failed[0]}")

    def write(self) -> str:
        """Write tables and figures; the tables."""
        groups = report.groups_of(self.log.lines, self.costs)
        if not groups:
            raise ValueError(f"{self.log.path} has no run on a test split yet.")
        text = report.table(groups)
        if why := report.reasons(self.log.lines):
            text += f"\n\n### Why\n\n{why}\n"
        (self.folder / "study.md").write_text(text + "\n", encoding="utf-8")
        report.draw(groups, self.folder / "study.png")
        return text


def main(config: StudyConfig) -> None:
    """Run the study."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    quiet()
    study = Study(config)
    torch.backends.cuda.matmul.allow_tf32 = True
    if config.only == "plan":
        print(study.plan())
        return
    try:
        if config.only != "table":
            with only_training_in(config.output_dir):
                print(study.plan(), flush=True)
                study.measure()
                if config.only != "costs":
                    print(study.plan(), flush=True)
                    study.run()
    finally:  # also when it was stopped
        if any(line["split"] == "test" for line in study.log.lines):
            print("\n" + study.write())
