"""What a comparison measures and how sure it is: ranks of every query, paired differences, table, figure.

Every variant answers the same queries after training on the same pairs with the same seeds, so the difference of two
variants is formed query by query and seed by seed, D (seeds, queries), and then averaged. Its 95 % interval holds for
new seeds and new queries alike: with m_s the mean of seed s and m_q that of query q,

    SE^2 = var(m_s) / S + var(m_q) / Q,    interval = mean ± t * SE,

t for Satterthwaite's degrees of freedom. A percentile bootstrap over three seeds is too narrow: it resamples a
variance that three numbers underestimate, and knows nothing of the t distribution (`test_significance.py` measures
both). With one seed the interval is over queries alone, and the table says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from scipy import stats


def measures(ranks: np.ndarray) -> dict[str, float]:
    """hit@1, hit@10 and MRR over the whole corpus, in per cent."""
    hits = {f"hit@{k}": 100 * float((ranks <= k).mean()) for k in (1, 10)}
    return {**hits, "MRR": 100 * float((1 / ranks).mean())}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        pooling: Name of the variant.
        seed: Seed.
        before: Ranks by search, untrained.
        after: Ranks by search, trained.
        steps: Optimizer steps.
        step_seconds: Median time of a step, loading of the batch included.
        train_seconds: Time of all steps.
        log: Loss and its parts by step.
    """

    pooling: str
    seed: int
    before: Mapping[str, np.ndarray]
    after: Mapping[str, np.ndarray]
    steps: int
    step_seconds: float
    train_seconds: float
    log: Sequence[Mapping[str, float]]

    def summary(self) -> str:
        """Time and scores in one line."""
        gains = [
            f"{100 * (1 / self.before[search]).mean():.1f} to {100 * (1 / self.after[search]).mean():.1f}"
            for search in self.after
        ]
        return f"{self.steps} steps in {self.train_seconds:.0f} s, MRR {', '.join(gains)}"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        ranks = {kind: {name: list(map(int, r)) for name, r in getattr(self, kind).items()} for kind in _KINDS}
        return {**asdict(self), **ranks}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Run:
        """The inverse of `to_json`; other keys are ignored."""
        ranks = {kind: {name: np.array(r) for name, r in values[kind].items()} for kind in _KINDS}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__} | ranks)


_KINDS = ("before", "after")


@dataclass(frozen=True)
class Difference:
    """A paired difference of mean reciprocal ranks in points (per cent): mean and 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(values: np.ndarray) -> Difference:
    """Mean and 95 % interval of D (seeds, queries), over new seeds and new queries; see the head of this file.

    Args:
        values: (S, Q) differences; with S = 1 the interval is over queries alone.

    Returns:
        Mean and interval, in the unit of `values`.
    """
    seeds, queries = values.shape
    parts = []  # (variance of the mean, degrees of freedom)
    for means in (values.mean(1), values.mean(0)):
        if len(means) > 1:
            parts.append((means.var(ddof=1) / len(means), len(means) - 1))
    variance = sum(part for part, _ in parts)
    mean = float(values.mean())
    if not variance:
        return Difference(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - half, mean + half)


def reciprocal_ranks(runs: Sequence[Run], search: str, kind: str = "after") -> np.ndarray:
    """(S, Q) reciprocal ranks in per cent, seeds in order."""
    ordered = sorted(runs, key=lambda run: run.seed)
    return np.stack([100 / getattr(run, kind)[search] for run in ordered])


def by_pooling(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of every pooling, in order of appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.pooling, []).append(run)
    return found


def table(runs: Sequence[Run], baseline: str, documents: Mapping[str, int]) -> str:
    """Markdown: MRR before and after, hit@1 and hit@10, the paired difference, and the cost.

    Args:
        runs: All runs.
        baseline: The pooling that the others are compared with, on the seeds that both have.
        documents: Number of documents of every search, for the level of chance.

    Returns:
        A table and a line that says how to read it.
    """
    groups = by_pooling(runs)
    head = [
        "search",
        "pooling",
        "MRR before",
        "MRR after",
        f"against {baseline}",
        "hit@1",
        "hit@10",
        "steps",
        "s/step",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for search in runs[0].after:
        for pooling, mine in groups.items():
            scores = reciprocal_ranks(mine, search)
            ranks = np.stack([run.after[search] for run in mine])
            cells = [
                f"{reciprocal_ranks(mine, search, 'before').mean():.1f}",
                _spread(scores.mean(1)),
                "" if pooling == baseline else _against(mine, groups.get(baseline, []), search),
                f"{100 * (ranks <= 1).mean():.1f}",
                f"{100 * (ranks <= 10).mean():.1f}",
                f"{np.mean([run.steps for run in mine]):.0f}",
                _cost(mine, groups.get(baseline, [])),
            ]
            lines.append(f"| {search} | {pooling} | " + " | ".join(cells) + " |")
        size = documents[search]
        chance = (100 * np.mean(1 / np.arange(1, size + 1)), 100 / size, 100 * min(1, 10 / size))
        lines.append(f"| {search} | chance | | {chance[0]:.1f} | | {chance[1]:.1f} | {chance[2]:.1f} | | |")
    seeds = len({run.seed for run in runs})
    over = "seeds and queries" if seeds > 1 else "queries alone: one seed says nothing about the next"
    lines += ["", f"In %; mean of {seeds} seeds ± half their range; in brackets the 95 % interval over {over}."]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {np.ptp(values) / 2:.1f}"


def _against(mine: Sequence[Run], baseline: Sequence[Run], search: str) -> str:
    shared = {run.seed for run in mine} & {run.seed for run in baseline}
    if not shared:
        return ""
    pair = [reciprocal_ranks([run for run in runs if run.seed in shared], search) for runs in (mine, baseline)]
    found = paired_difference(pair[0] - pair[1])
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _cost(mine: Sequence[Run], baseline: Sequence[Run]) -> str:
    seconds = float(np.median([run.step_seconds for run in mine]))
    shown = f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"
    if not baseline or mine is baseline:
        return shown
    return f"{shown} ({seconds / float(np.median([run.step_seconds for run in baseline])):.2f}x)"


def draw(runs: Sequence[Run], path: Path) -> None:
    """A panel for each search with every seed before and after training; and the ranking loss over time.

    Args:
        runs: All runs.
        path: Where the picture goes.
    """
    groups = by_pooling(runs)
    searches = list(runs[0].after)
    figure, axes = plt.subplots(1, len(searches) + 1, figsize=(4 * len(searches) + 5, 4.2), layout="constrained")
    for axis, search in zip(axes, searches, strict=False):
        for place, mine in enumerate(groups.values()):
            for kind, face in (("before", "none"), ("after", f"C{place}")):
                values = reciprocal_ranks(mine, search, kind).mean(1)
                axis.scatter([place] * len(values), values, facecolors=face, edgecolors=f"C{place}", zorder=3)
            axis.plot([place - 0.2, place + 0.2], [values.mean()] * 2, color=f"C{place}")
        axis.set(title=search, xticks=range(len(groups)), xlim=(-0.6, len(groups) - 0.4))
        axis.set_xticklabels(list(groups), rotation=20, ha="right")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("MRR, %: before (hollow) and after, a point each seed")
    for place, (pooling, mine) in enumerate(groups.items()):
        for run in mine:
            values = [row.get("ranking", row["loss"]) for row in run.log]
            seconds = np.arange(1, len(values) + 1) * run.step_seconds
            axes[-1].plot(seconds, values, color=f"C{place}", lw=1, label=pooling if run is mine[0] else None)
    axes[-1].set(title="ranking loss", xlabel="seconds of training")
    axes[-1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
