"""Train and score one variant after another; every run is a line of `runs.jsonl`, and is never repeated."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from recipes.data.searches import Search
from recipes.research.controls import ControlLoss
from recipes.research.run_log import RunLog
from recipes.research.variant import VariantSettings
from recipes.research.variants import Training, build_variant, fit_variant
from recipes.study.inputs import Corpus
from recipes.study.probes import Conflict, information
from recipes.study.variants import VARIANTS, current_name

PROBE_ROWS = 16


@dataclass(frozen=True)
class Wanted:
    """A run, before it is made. Equal ones are the same run.

    Args:
        backbone: Its name on the command line.
        corpus: Its name on the command line.
        variant: Name of the variant.
        seed: Seed.
        rate: Peak learning rate.
        steps: Training steps, both phases; 0: the untrained model is searched.
        batch_size: Pairs a step.
        split: What is searched: `validation` to choose a rate, `test` to report.
    """

    backbone: str
    corpus: str
    variant: str
    seed: int
    rate: float
    steps: int
    batch_size: int
    split: str


class Log(RunLog):
    """The lines of the study; in those of older runs a variant is called `arm`, and may have another name."""

    def understood(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line under today's names."""
        name = line.pop("arm", None) or line["variant"]
        return {**line, "variant": current_name(name)}


def make_run(wanted: Wanted, settings: VariantSettings, corpus: Corpus, title: str) -> dict[str, Any]:
    """Train and score a variant.

    Returns:
        The line for the log: ranks by search, seconds a step (where several runs share the machine, of that too), the
        losses, and, for seed 0, what the probes found.
    """
    compared = VARIANTS[wanted.variant]
    variant = compared.build(wanted.steps)
    own = replace(settings, steps=wanted.steps, learning_rate=wanted.rate, batch_size=wanted.batch_size)
    model, loss = build_variant(variant, own, wanted.seed)
    probe = _probe(corpus.searches["validation"])
    # The probes take half as long as the training itself, so the first seed alone is probed.
    probed = wanted.steps and not wanted.seed and compared.has_condensation and not compared.condensation_first
    conflict = Conflict(loss, probe, _probed_steps(wanted.steps)) if probed else None
    trainings = []
    if compared.unlabelled and wanted.steps:
        first = compared.first_steps(wanted.steps)
        phase, alone = replace(own, steps=first), unlabelled_loss(model, first)
        trainings.append(fit_variant(model, alone, variant, phase, wanted.seed, corpus.unlabelled, f"{title}, first"))
        own = replace(own, steps=wanted.steps - first)
    followers: list[TrainerCallback] = [conflict] if conflict else []
    if wanted.steps:
        trainings.append(
            fit_variant(model, loss, variant, own, wanted.seed, corpus.train, title, lambda _: list(followers))
        )
    log = trainings[-1].log if trainings else []
    with _pooled_in_float32(model):
        ranks = {search.name: list(map(int, search.ranks(model))) for search in corpus.searches[wanted.split]}
    line = {
        **asdict(wanted),
        "ranks": ranks,
        "seconds_a_step": round(_seconds(trainings) / max(1, wanted.steps), 4),
        "loss": [round(row.get("ranking", row["loss"]), 3) for row in log],
        "condensation": [round(row["condensation_nll"], 3) for row in log if "condensation_nll" in row],
    }
    if conflict:
        line["conflict"] = conflict.found
        line["information"] = information(loss, probe)
    del model, loss, conflict
    followers.clear()
    gc.collect()
    return line


@contextmanager
def _pooled_in_float32(model: SentenceTransformer) -> Iterator[None]:
    """States are pooled and normalised in float32: vectors of untrained models lie closer than bfloat16 can tell."""
    hook = model[0].register_forward_hook(
        lambda module, given, features: {**features, "token_embeddings": features["token_embeddings"].float()}
    )
    try:
        yield
    finally:
        hook.remove()


def unlabelled_loss(model: SentenceTransformer, steps: int) -> ControlLoss:
    """The condensation loss alone, each document generated from its own BToks, for so many steps."""
    return ControlLoss(model, condensation_weight=1.0, target="self", condensation_warmup=steps)


def _seconds(trainings: Sequence[Training]) -> float:
    """Time of all steps: each phase's median step counts, so that a disturbed one does not.

    On the CPU the processor's, which other processes don't lengthen; on a GPU the clock's.
    """
    clocks = [t.times if torch.cuda.is_available() else t.cpu_times for t in trainings]
    return sum(float(np.median(np.diff(clock))) * (len(clock) - 1) for clock in clocks)


def _probe(searches: Sequence[Search]) -> list[list[Any]]:
    """The first validation pairs as two columns."""
    search = searches[0]
    queries = search.queries[:PROBE_ROWS]
    documents = [search.documents[min(right)] for right in search.relevant[:PROBE_ROWS]]
    return [search.load(queries), search.load(documents)]


def _probed_steps(steps: int) -> list[int]:
    return sorted({0, steps // 8, steps // 4, steps // 2, steps - 1})


def mean_reciprocal_ranks(line: dict[str, Any]) -> np.ndarray:
    """(Q,) of the queries of both directions, in per cent."""
    return 100 / np.concatenate([np.array(ranks) for ranks in line["ranks"].values()])


def best_rate(log: Log, wanted: Wanted, rates: Sequence[float]) -> float | None:
    """The rate of the highest mean reciprocal rank on validation; None while one is missing."""
    if len(rates) == 1:
        return rates[0]
    scores = {}
    for rate in rates:
        line = log.find(asdict(replace(wanted, rate=rate)))
        if line is None:
            return None
        scores[rate] = mean_reciprocal_ranks(line).mean()
    return max(scores, key=lambda rate: scores[rate])
