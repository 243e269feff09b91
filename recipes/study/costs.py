"""What a step of every variant costs beside the baseline's: timed alone, before runs that may share the machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recipes.research.variant import VariantSettings
from recipes.research.variants import build_variant, fit_variant
from recipes.study.inputs import Corpus
from recipes.study.runs import Log, Wanted, unlabelled_loss
from recipes.study.variants import BASELINE, VARIANTS

TIMED_STEPS = 3  # after one that is not counted
SAME_COST = 0.05  # a variant whose step costs within 5 % of the baseline's needs no run of its own at equal time


class Costs:
    """Measured costs, in a file.

    Args:
        log: Lines of backbone, corpus, variant, round and seconds a step.
    """

    def __init__(self, log: Log) -> None:
        self.log = log

    def seconds(self, backbone: str, corpus: str, variant: str) -> dict[int, float]:
        """Seconds a step by round; a corpus that is cut to some pairs costs what the whole one does."""
        key = {"backbone": backbone, "corpus": _kind(corpus), "variant": variant}
        return {line["round"]: line["seconds"] for line in self.log.lines if key.items() <= line.items()}

    def ratio(self, backbone: str, corpus: str, variant: str) -> float | None:
        """Median over the rounds of a variant's seconds over the baseline's; None where one was not timed."""
        mine, base = self.seconds(backbone, corpus, variant), self.seconds(backbone, corpus, BASELINE)
        both = sorted(set(mine) & set(base))
        return float(np.median([mine[r] / base[r] for r in both])) if both else None

    def equal_time_steps(self, wanted: Wanted) -> int | None:
        """The steps that fit into the baseline's time, for a run at equal steps.

        None where equal steps are equal time already, or nothing was timed.
        """
        ratio = self.ratio(wanted.backbone, wanted.corpus, wanted.variant)
        return None if ratio is None or abs(ratio - 1) <= SAME_COST else max(2, round(wanted.steps / ratio))

    def measure(
        self, backbone: str, corpus: Corpus, variants: Sequence[str], settings: VariantSettings, rounds: int
    ) -> Iterator[str]:
        """Time what is not timed yet, every variant once a round; a line on each measurement."""
        own = replace(settings, steps=1 + TIMED_STEPS)
        for number in range(rounds):
            for variant in variants:
                if number in self.seconds(backbone, corpus.name, variant):
                    continue
                seconds = _seconds_a_step(variant, own, corpus)
                line: dict[str, Any] = {"backbone": backbone, "corpus": _kind(corpus.name), "variant": variant}
                line |= {"round": number, "batch_size": own.batch_size, "seconds": round(seconds, 4)}
                self.log.add(line)
                yield f"{backbone}, {_kind(corpus.name)}, {variant}: {seconds:.2f} s a step (round {number})"


def _seconds_a_step(name: str, settings: VariantSettings, corpus: Corpus) -> float:
    """A step of both phases, each with its share. On the CPU of processor time, on a GPU of the clock."""
    compared = VARIANTS[name]
    variant = compared.build(settings.steps)
    model, loss = build_variant(variant, settings, 0)
    parts = [(1 - compared.condensation_first if compared.unlabelled else 1.0, loss, corpus.train)]
    if compared.unlabelled:
        parts.append((compared.condensation_first, unlabelled_loss(model, settings.steps), corpus.unlabelled))
    seconds = 0.0
    for share, own, pairs in parts:
        training = fit_variant(model, own, variant, settings, 0, pairs, f"{name}: cost")
        clock = training.times if torch.cuda.is_available() else training.cpu_times
        seconds += share * float(np.median(np.diff(clock)[1:]))
    del model, loss, parts, own
    gc.collect()
    return seconds


def _kind(corpus: str) -> str:
    return corpus.partition("@")[0]
