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

from evaluation import markdown


def measures(ranks: np.ndarray) -> dict[str, float]:
    """hit@1, hit@10 and MRR over the whole corpus, in per cent."""
    hits = {f"hit@{k}": 100 * float((ranks <= k).mean()) for k in (1, 10)}
    return {**hits, "MRR": 100 * float((1 / ranks).mean())}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        variant: Its name.
        seed: Seed.
        before: Ranks by search, untrained.
        after: Ranks by search, trained.
        steps: Optimizer steps.
        step_seconds: Median time of a step, loading of the batch included.
        train_seconds: Time of all steps.
        log: Loss and its parts by step.
    """

    variant: str
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
    parts = _variances(values)
    variance = sum(part for part, _ in parts)
    mean = float(values.mean())
    if not variance:
        return Difference(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - half, mean + half)


def _variances(values: np.ndarray) -> list[tuple[float, int]]:
    """Variance of the mean over seeds and over queries, each with its degrees of freedom; none over a single one."""
    means = [values.mean(axis) for axis in (1, 0)]
    return [(float(part.var(ddof=1)) / len(part), len(part) - 1) for part in means if len(part) > 1]


def queries_that_show(values: np.ndarray, points: float) -> int | None:
    """How many queries show a difference of so many points: 95 % confidence, in four of five comparisons.

    The variance over queries falls with their number, that over seeds does not: with n queries, SE^2 = var(m_s) / S +
    var(m_q) / n must be (points / (1.96 + 0.84))^2. `values` (S, Q) are the differences of a comparison that was made.

    Returns:
        The number; None if no number does, because the seeds differ too much.
    """
    allowed = (points / (stats.norm.ppf(0.975) + stats.norm.ppf(0.8))) ** 2
    between = values.mean(1)
    # Seeds are scored on the same queries, so part of what they differ by is the queries' noise within a seed.
    own = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    queries = values.shape[1]
    noise = float((own**2).sum() / max(1, (len(values) - 1) * (queries - 1)) / queries) if len(values) > 1 else 0.0
    seeds = max(0.0, float(between.var(ddof=1)) - noise) / len(values) if len(values) > 1 else 0.0
    if seeds >= allowed:
        return None
    return int(np.ceil(values.mean(0).var(ddof=1) / (allowed - seeds)))


def verdicts(runs: Sequence[Run], baseline: str, pairs: int, points: float = 3.0) -> list[str]:
    """What the comparison shows, in a sentence for each variant but the baseline; over all searches together.

    `points` is the difference in MRR that the sentence on too few held-out pairs speaks of.
    """
    groups = by_variant(runs)
    lines = []
    for variant, mine in groups.items():
        values = _paired(mine, groups.get(baseline, []), list(runs[0].after))
        if variant == baseline or values is None:
            continue
        found = paired_difference(values)
        span = f"{found.mean:+.1f} points of MRR, 95 % interval {found.low:+.1f} to {found.high:+.1f}"
        seeds = f"{len(values)} seed{'s' * (len(values) > 1)}"
        if found.low > 0 or found.high < 0:
            word = "better" if found.mean > 0 else "worse"
            lines.append(f"{variant} is {word} than {baseline} on {pairs} held-out pairs, {seeds}: {span}.")
            continue
        wanted = queries_that_show(values, points)
        if wanted is None:
            more = f"more seeds are needed to show {points:g} points"
        elif wanted <= values.shape[1]:
            more = f"a difference of {points:g} points would probably have shown"
        else:
            more = f"about {_round(wanted * pairs / values.shape[1])} pairs would show {points:g} points"
        lines.append(
            f"No difference shown between {variant} and {baseline} with {pairs} held-out pairs, {seeds} ({span}); "
            f"{more}."
        )
    return lines


def _round(number: float) -> int:
    """To two digits."""
    step = 10 ** max(0, int(np.log10(max(1, number))) - 1)
    return int(np.ceil(number / step) * step)


def reciprocal_ranks(runs: Sequence[Run], search: str, kind: str = "after") -> np.ndarray:
    """(S, Q) reciprocal ranks in per cent, seeds in order."""
    ordered = sorted(runs, key=lambda run: run.seed)
    return np.stack([100 / getattr(run, kind)[search] for run in ordered])


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of every variant, in order of appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.variant, []).append(run)
    return found


def table(runs: Sequence[Run], baseline: str, documents: Mapping[str, int], pairs: int | None = None) -> str:
    """Markdown: MRR before and after, hit@1 and hit@10, the paired difference to the baseline, and the cost.

    `documents` holds the number of documents of every search, for the level of chance. The head names held-out pairs,
    candidates, chance and seeds; a last line says how to read the table.
    """
    groups = by_variant(runs)
    head = ["search", "variant", "MRR before", "MRR after", f"against {baseline}"]
    head += ["hit@1", "hit@10", "steps", "s/step"]
    rows = []
    for search in runs[0].after:
        for variant, mine in groups.items():
            scores = reciprocal_ranks(mine, search)
            ranks = np.stack([run.after[search] for run in mine])
            cells = [
                f"{reciprocal_ranks(mine, search, 'before').mean():.1f}",
                _spread(scores.mean(1)),
                "" if variant == baseline else _against(mine, groups.get(baseline, []), search),
                f"{100 * (ranks <= 1).mean():.1f}",
                f"{100 * (ranks <= 10).mean():.1f}",
                f"{np.mean([run.steps for run in mine]):.0f}",
                _cost(mine, groups.get(baseline, [])),
            ]
            rows.append([search, variant, *cells])
        size = documents[search]
        rows.append([search, "chance", "", f"{_chance(size):.1f}", "", f"{100 / size:.1f}"])
        rows[-1] += [f"{100 * min(1, 10 / size):.1f}", "", ""]
    seeds = len({run.seed for run in runs})
    over = "seeds and queries" if seeds > 1 else "queries alone: one seed says nothing about the next"
    levels = {size: f"MRR {_chance(size):.1f} among {size} candidates" for size in documents.values()}
    held_out = f"{pairs} held-out pairs; chance" if pairs else "Chance"
    lines = [f"{held_out} is {', '.join(levels.values())}; {seeds} seed{'s' * (seeds > 1)}.", ""]
    lines += [markdown.table(head, rows, numbers=True), ""]
    lines.append(f"In %; mean of {seeds} seeds ± half their range; in brackets the 95 % interval over {over}.")
    return "\n".join(lines)


def _chance(documents: int) -> float:
    """Mean reciprocal rank of a blind guess, in per cent."""
    return 100 * float(np.mean(1 / np.arange(1, documents + 1)))


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {np.ptp(values) / 2:.1f}"


def _paired(mine: Sequence[Run], baseline: Sequence[Run], searches: Sequence[str]) -> np.ndarray | None:
    """(S, Q) differences over the seeds that both have, the queries of all searches in a row; None without seeds."""
    shared = {run.seed for run in mine} & {run.seed for run in baseline}
    if not shared:
        return None
    both = [[run for run in runs if run.seed in shared] for runs in (mine, baseline)]
    first, second = (np.concatenate([reciprocal_ranks(runs, name) for name in searches], axis=1) for runs in both)
    return first - second


def _against(mine: Sequence[Run], baseline: Sequence[Run], search: str) -> str:
    values = _paired(mine, baseline, [search])
    if values is None:
        return ""
    found = paired_difference(values)
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _cost(mine: Sequence[Run], baseline: Sequence[Run]) -> str:
    seconds = float(np.median([run.step_seconds for run in mine]))
    shown = f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"
    if not baseline or mine is baseline:
        return shown
    return f"{shown} ({seconds / float(np.median([run.step_seconds for run in baseline])):.2f}x)"


def draw(runs: Sequence[Run], path: Path) -> None:
    """A panel for each search with every seed before and after training; and the ranking loss over time."""
    groups = by_variant(runs)
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
    for place, (variant, mine) in enumerate(groups.items()):
        for run in mine:
            values = [row.get("ranking", row["loss"]) for row in run.log]
            seconds = np.arange(1, len(values) + 1) * run.step_seconds
            axes[-1].plot(seconds, values, color=f"C{place}", lw=1, label=variant if run is mine[0] else None)
    axes[-1].set(title="ranking loss", xlabel="seconds of training")
    axes[-1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
