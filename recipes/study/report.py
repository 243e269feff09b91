"""Table and figures of the study, from `runs.jsonl` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np

from recipes.research.significance import Difference, paired_difference
from recipes.study.arms import ARMS, BASELINE, PROMPTED
from recipes.study.costs import SAME_COST, Costs
from recipes.study.runs import mean_reciprocal_ranks

EQUAL = ("steps", "time")
COLUMNS = 5  # of a figure
# What the defaults rest on, beside the baseline: each arm against the one that differs from it in one thing.
PAIRS = (
    ("BToks", "BToks, last"),
    ("BToks", "end token"),
    ("line break start", "BToks"),
    ("line break start", "line break start, last"),
    ("line break start", "line break"),
    ("topic start", "mean of the prompt"),
    ("topic start, last", PROMPTED),
    ("topic, opened turn", "topic start"),
    ("last token, opened turn, prompt", PROMPTED),
    ("topic start", "line break start"),
    ("topic start", "topic start, last"),
    ("topic start", "topic start, rows untrained"),
    ("topic start, term 0.2", "topic start"),
    ("prompt start", "topic start"),
    ("prompt start", "line break start"),
    ("prompt start", "BToks"),
    ("prompt start", "prompt start, rows untrained"),
    ("BToks, term 0.2", "BToks"),
    ("BToks, term 0.2", "no mask"),
    ("BToks, term 0.2", "K = 1"),
    ("BToks, term 0.2", "K = 16"),
)


@dataclass(frozen=True)
class Group:
    """Runs of one backbone and corpus that may be compared.

    Args:
        title: Backbone, corpus, steps and batch.
        runs: By `equal` and arm, lines by seed.
        costs: By arm, what a step costs beside the baseline's, as far as it was timed.
    """

    title: str
    runs: Mapping[str, Mapping[str, Mapping[int, dict[str, Any]]]]
    costs: Mapping[str, float]

    def difference(self, arm: str, equal: str, other: str = BASELINE) -> Difference | None:
        """Points of MRR above another arm at its full steps, on the seeds that both have; None without any.

        An arm whose step costs what the baseline's costs needs no run at equal time: those at equal steps are it.
        """
        mine = self.runs[equal].get(arm, {})
        if equal == "time" and not mine and abs(self.costs.get(arm, 0) - 1) <= SAME_COST:
            mine = self.runs["steps"].get(arm, {})
        base = self.runs["steps"].get(other, {})
        seeds = sorted(set(mine) & set(base))
        if not seeds:
            return None
        values = [mean_reciprocal_ranks(mine[seed]) - mean_reciprocal_ranks(base[seed]) for seed in seeds]
        return paired_difference(np.stack(values))

    @property
    def candidates(self) -> int:
        """How many are searched."""
        lines = [line for runs in self.runs["steps"].values() for line in runs.values()]
        return max(len(ranks) for line in lines for ranks in line["ranks"].values())

    def scores(self, arm: str) -> np.ndarray:
        """(seeds,) MRR at equal steps, in per cent."""
        lines = self.runs["steps"].get(arm, {})
        return np.array([mean_reciprocal_ranks(lines[seed]).mean() for seed in sorted(lines)])


def groups_of(lines: Sequence[dict[str, Any]], costs: Costs) -> list[Group]:
    """Runs on the test split, by backbone, corpus, batch and steps of the baseline; runs of as many are `steps`.

    Every arm may have a rate of its own, but not two: runs that differ in nothing but the rate are groups by rate.
    """
    tests = [line for line in lines if line["split"] == "test"]
    by_rate = _at_several_rates(tests)

    def key(line: dict[str, Any]) -> tuple[str, str, int, int, float | None]:
        kind = line["backbone"], line["corpus"], line["batch_size"]
        return *kind, _steps_of_baseline(line, tests), line["rate"] if kind in by_rate else None

    keys = [key(line) for line in tests]
    found = []
    for group in dict.fromkeys(keys):
        backbone, corpus, batch_size, steps, rate = group
        own = [line for line, mine in zip(tests, keys, strict=True) if mine == group]
        runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = {equal: {} for equal in EQUAL}
        for line in own:
            equal = "steps" if line["steps"] == steps else "time"
            runs[equal].setdefault(line["arm"], {})[line["seed"]] = line
        ratios = {arm: costs.ratio(backbone, corpus, arm) for arm in ARMS}
        known = {arm: ratio for arm, ratio in ratios.items() if ratio is not None}
        trained = f"{steps} steps of {batch_size}" if steps else "untrained"
        title = f"{backbone}, {corpus}, {trained}" + (f" at {rate:g}" if rate and steps else "")
        found.append(Group(title, runs, known))
    return found


def _steps_of_baseline(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> int:
    """Of the baseline's runs beside this one, the number of steps that is nearest to its own, as a ratio."""
    kind = ("backbone", "corpus", "batch_size")
    beside = [other for other in lines if all(other[name] == line[name] for name in kind)]
    steps = {other["steps"] for other in beside if other["arm"] == BASELINE} or {max(o["steps"] for o in beside)}
    return min(sorted(steps), key=lambda own: abs(float(np.log((own + 1e-3) / (line["steps"] + 1e-3)))))


def _at_several_rates(lines: Sequence[dict[str, Any]]) -> set[tuple[str, str, int]]:
    """Backbones, corpora and batches of which an arm was run at more than one rate with the same seed and steps."""
    rates: dict[tuple[Any, ...], set[float]] = {}
    for line in lines:
        kind = line["backbone"], line["corpus"], line["batch_size"]
        rates.setdefault((*kind, line["arm"], line["seed"], line["steps"]), set()).add(line["rate"])
    return {run[:3] for run, several in rates.items() if len(several) > 1}


def table(groups: Sequence[Group]) -> str:
    """Markdown, an arm a line.

    Args:
        groups: What was run.

    Returns:
        A table for every group and how to read it.
    """
    lines = []
    for group in groups:
        prompted = PROMPTED in group.runs["steps"]
        lines += [
            f"### {group.title}\n",
            f"| arm | seeds | rate | MRR among {group.candidates} | above {BASELINE}, equal steps | equal time | "
            + (f"above {PROMPTED} | " if prompted else "")
            + "cost of a step |",
            "|---|---:|---:|---:|---:|---:|---:|" + "---:|" * prompted,
        ]
        for arm in ARMS:
            runs = group.runs["steps"].get(arm, {})
            if not runs:
                continue
            rate = f"{next(iter(runs.values()))['rate']:g}"
            cells = [str(len(runs)), rate, _spread(group.scores(arm))]
            cells += ["" if arm == BASELINE else _shown(group.difference(arm, equal)) for equal in EQUAL]
            if prompted:
                cells.append("" if arm == PROMPTED else _shown(group.difference(arm, "steps", PROMPTED)))
            cost = f"{group.costs[arm]:.2f}x" if arm in group.costs else "not timed"
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {cost} |")
        for arm, other in PAIRS:
            if found := group.difference(arm, "steps", other):
                lines.append(f"| {arm}, above {other} | | | | {_shown(found)} | | |" + " |" * prompted)
        lines.append("")
    lines.append(
        "MRR in % over both directions of search, mean of the seeds ± half their range. In brackets the 95 % interval "
        "of the paired difference over seeds and queries; with one seed over queries alone. In the last "
        "rows the difference is to the arm named there. Cost was timed alone."
    )
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {np.ptp(values) / 2:.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def _shown(found: Difference | None) -> str:
    return "not run" if found is None else f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def reasons(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: the two gradients' cosine over the training, and what the BToks tell the decoder.

    Args:
        lines: Runs, of which those with probes are shown, seed by seed averaged.

    Returns:
        A table, empty without probed runs.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["split"] == "test" and "information" in line:
            found.setdefault((line["backbone"], line["corpus"], line["arm"]), []).append(line)
    rows = []
    for (backbone, corpus, arm), mine in found.items():
        steps = list(mine[0]["conflict"])
        same = [line for line in mine if list(line["conflict"]) == steps]
        cosines = [np.mean([line["conflict"][step]["cosine"] for line in same]) for step in steps]
        ratio = np.mean([line["conflict"][step]["ratio"] for line in same for step in steps])
        own, other = (np.mean([line["information"][kind] for line in mine]) for kind in ("own", "other"))
        shown = ", ".join(f"{cosine:+.2f}" for cosine in cosines)
        rows.append(f"| {backbone}, {corpus} | {arm} | {shown} | {ratio:.2f} | {own:.2f} | {other - own:+.2f} |")
    if not rows:
        return ""
    head = (
        "| run | arm | cosine of the gradients at 0, 1/8, 1/4, 1/2 and the end | norm, term / ranking | "
        "nats per target token | saved by the own BToks |\n|---|---|---:|---:|---:|---:|"
    )
    return "\n".join([head, *rows])


def draw(groups: Sequence[Group], path: Path) -> None:
    """Paired differences to the baseline with their intervals: filled at equal steps, hollow at equal time.

    Args:
        groups: What was run.
        path: The PNG.
    """
    groups = [group for group in groups if len(group.runs["steps"]) > 1]  # nothing is compared with a lone baseline
    names = [arm for arm in ARMS if arm != BASELINE and any(arm in group.runs["steps"] for group in groups)]
    columns = min(len(groups), COLUMNS) or 1
    rows = max(1, -(-len(groups) // columns))
    size = (3.4 * columns + 2.2, (0.28 * len(names) + 1.2) * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        for place, arm in enumerate(names):
            for equal, shift, face in (("steps", -0.13, "C0"), ("time", 0.13, "white")):
                found = group.difference(arm, equal)
                if found is not None:
                    axis.plot([found.low, found.high], [place + shift] * 2, color="C0", lw=1)
                    axis.plot(found.mean, place + shift, "o", color="C0", mfc=face, ms=5)
        axis.axvline(0, color="k", lw=0.8)
        axis.set(title=group.title.replace(", ", "\n", 1), yticks=range(len(names)), yticklabels=names)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(8)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(f"points of MRR above {BASELINE} (filled: equal steps, hollow: equal time)", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(groups: Sequence[Group], path: Path) -> None:
    """Ranking loss over time, the mean of the seeds.

    Args:
        groups: What was run.
        path: The PNG.
    """
    figure, axes = plt.subplots(
        1, len(groups), figsize=(4.2 * len(groups) + 2, 4), squeeze=False, layout="constrained"
    )
    for axis, group in zip(axes[0], groups, strict=True):
        for number, arm in enumerate(ARMS):
            runs = list(group.runs["steps"].get(arm, {}).values())
            if not runs:
                continue
            losses = np.mean([run["loss"] for run in runs], 0)
            smooth = np.convolve(losses, np.ones(5) / 5, "valid") if len(losses) > 5 else losses
            seconds = np.arange(1, len(smooth) + 1) * group.costs.get(arm, 1)
            axis.plot(seconds, smooth, label=arm, lw=1, color=f"C{number % 10}", ls="-" if number < 10 else "--")
        axis.set(title=group.title.replace(", ", "\n", 1), xlabel="time, in steps of last-token pooling")
        axis.title.set_fontsize(8)
    axes[0, 0].set_ylabel("ranking loss, mean of five steps")
    axes[0, -1].legend(fontsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)
