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

from evaluation import markdown
from recipes.research.significance import Difference, paired_difference
from recipes.study.costs import SAME_COST, Costs
from recipes.study.runs import mean_reciprocal_ranks
from recipes.study.variants import BASELINE, PROMPTED, VARIANTS

EQUAL = ("steps", "time")
COLUMNS = 5  # of a figure
# What the defaults rest on, beside the baseline: each variant against the one that differs from it in one thing.
PAIRS = (
    ("BToks", "BToks, last"),
    ("BToks", "end token"),
    ("newline start", "BToks"),
    ("newline start", "newline start, last"),
    ("newline start", "newline"),
    ("topic start", "mean of the prompt"),
    ("topic start, last", PROMPTED),
    ("topic, opened turn", "topic start"),
    ("last token, opened turn, prompt", PROMPTED),
    ("topic start", "newline start"),
    ("topic start", "topic start, last"),
    ("topic start", "topic start, rows untrained"),
    ("topic start, condensation 0.2", "topic start"),
    ("topic start, condensation 1", "topic start"),
    ("topic start, condensation first", "topic start"),
    ("topic start, condensation 0.2", "topic start, no mask"),
    ("topic start, condensation 0.2", "topic start, K = 1"),
    ("topic start, condensation 0.2", "topic start, K = 16"),
    ("topic start, condensation 0.2", PROMPTED),
    ("prompt start", "topic start"),
    ("prompt start", "newline start"),
    ("prompt start", "BToks"),
    ("prompt start", "prompt start, rows untrained"),
    ("BToks, condensation 0.2", "BToks"),
    ("BToks, condensation 0.2", "no mask"),
    ("BToks, condensation 0.2", "K = 1"),
    ("BToks, condensation 0.2", "K = 16"),
)


@dataclass(frozen=True)
class Group:
    """Runs of one backbone and corpus that may be compared.

    Args:
        title: Backbone, corpus, steps and batch.
        runs: By `equal` and variant, lines by seed.
        costs: By variant, what a step costs beside the baseline's, as far as it was timed.
    """

    title: str
    runs: Mapping[str, Mapping[str, Mapping[int, dict[str, Any]]]]
    costs: Mapping[str, float]

    def difference(self, variant: str, equal: str, other: str = BASELINE) -> Difference | None:
        """Points of MRR above another variant at its full steps, on the seeds that both have; None without any.

        A variant whose step costs what the baseline's costs needs no run at equal time: those at equal steps are it.
        """
        mine = self.runs[equal].get(variant, {})
        if equal == "time" and not mine and abs(self.costs.get(variant, 0) - 1) <= SAME_COST:
            mine = self.runs["steps"].get(variant, {})
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

    def scores(self, variant: str) -> np.ndarray:
        """(seeds,) MRR at equal steps, in per cent."""
        lines = self.runs["steps"].get(variant, {})
        return np.array([mean_reciprocal_ranks(lines[seed]).mean() for seed in sorted(lines)])


def groups_of(lines: Sequence[dict[str, Any]], costs: Costs) -> list[Group]:
    """Runs on the test split, by backbone, corpus, batch and steps of the baseline; runs of as many are `steps`.

    Every variant may have a rate of its own, but not two: runs that differ in nothing but the rate are groups by rate.
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
            runs[equal].setdefault(line["variant"], {})[line["seed"]] = line
        ratios = {name: costs.ratio(backbone, corpus, name) for name in VARIANTS}
        known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        trained = f"{steps} steps of {batch_size}" if steps else "untrained"
        title = f"{backbone}, {corpus}, {trained}" + (f" at {rate:g}" if rate and steps else "")
        found.append(Group(title, runs, known))
    return found


def _steps_of_baseline(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> int:
    """Of the baseline's runs beside this one, the number of steps that is nearest to its own, as a ratio."""
    kind = ("backbone", "corpus", "batch_size")
    beside = [other for other in lines if all(other[name] == line[name] for name in kind)]
    steps = {other["steps"] for other in beside if other["variant"] == BASELINE} or {max(o["steps"] for o in beside)}
    return min(sorted(steps), key=lambda own: abs(float(np.log((own + 1e-3) / (line["steps"] + 1e-3)))))


def _at_several_rates(lines: Sequence[dict[str, Any]]) -> set[tuple[str, str, int]]:
    """Backbones, corpora and batches of which a variant was run at more than one rate with the same seed and steps."""
    rates: dict[tuple[Any, ...], set[float]] = {}
    for line in lines:
        kind = line["backbone"], line["corpus"], line["batch_size"]
        rates.setdefault((*kind, line["variant"], line["seed"], line["steps"]), set()).add(line["rate"])
    return {run[:3] for run, several in rates.items() if len(several) > 1}


def table(groups: Sequence[Group]) -> str:
    """Markdown: a table for every group, a variant a line, and how to read it."""
    lines = []
    for group in groups:
        prompted = PROMPTED in group.runs["steps"]
        head = ["variant", "seeds", "rate", f"MRR among {group.candidates}", f"above {BASELINE}, equal steps"]
        head += ["equal time", *[f"above {PROMPTED}"] * prompted, "cost of a step"]
        rows = []
        for variant in VARIANTS:
            runs = group.runs["steps"].get(variant, {})
            if not runs:
                continue
            rate = f"{next(iter(runs.values()))['rate']:g}"
            cells = [str(len(runs)), rate, _spread(group.scores(variant))]
            cells += ["" if variant == BASELINE else _shown(group.difference(variant, equal)) for equal in EQUAL]
            if prompted:
                cells.append("" if variant == PROMPTED else _shown(group.difference(variant, "steps", PROMPTED)))
            cost = f"{group.costs[variant]:.2f}x" if variant in group.costs else "not timed"
            rows.append([variant, *cells, cost])
        for variant, other in PAIRS:
            if found := group.difference(variant, "steps", other):
                empty = [""] * (2 + prompted)
                rows.append([f"{variant}, above {other}", "", "", "", _shown(found), *empty])
        lines.append(f"### {group.title}\n\n{markdown.table(head, rows, numbers=True)}\n")
    lines.append(
        "MRR in % over both directions of search, mean of the seeds ± half their range. In brackets the 95 % interval "
        "of the paired difference over seeds and queries; with one seed over queries alone. In the last "
        "rows the difference is to the variant named there. Cost was timed alone."
    )
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {np.ptp(values) / 2:.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def _shown(found: Difference | None) -> str:
    return "not run" if found is None else f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def reasons(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: the two gradients' cosine over the training, and what the BToks tell the decoder.

    The mean of several seeds; an empty text if no run was probed.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["split"] == "test" and "information" in line:
            found.setdefault((line["backbone"], line["corpus"], line["variant"]), []).append(line)
    rows = []
    for (backbone, corpus, variant), mine in found.items():
        steps = list(mine[0]["conflict"])
        same = [line for line in mine if list(line["conflict"]) == steps]
        cosines = [np.mean([line["conflict"][step]["cosine"] for line in same]) for step in steps]
        ratio = np.mean([line["conflict"][step]["ratio"] for line in same for step in steps])
        own, other = (np.mean([line["information"][kind] for line in mine]) for kind in ("own", "other"))
        shown = ", ".join(f"{cosine:+.2f}" for cosine in cosines)
        rows.append([f"{backbone}, {corpus}", variant, shown, f"{ratio:.2f}", f"{own:.2f}", f"{other - own:+.2f}"])
    head = ["run", "variant", "cosine of the gradients at 0, 1/8, 1/4, 1/2 and the end"]
    head += ["norm, condensation / ranking", "nats per target token", "saved by the own BToks"]
    return markdown.table(head, rows, numbers=True) if rows else ""


def draw(groups: Sequence[Group], path: Path) -> None:
    """Paired differences to the baseline with their intervals: filled at equal steps, hollow at equal time."""
    groups = [group for group in groups if len(group.runs["steps"]) > 1]  # nothing is compared with a lone baseline
    names = [name for name in VARIANTS if name != BASELINE and any(name in group.runs["steps"] for group in groups)]
    columns = min(len(groups), COLUMNS) or 1
    rows = max(1, -(-len(groups) // columns))
    size = (3.4 * columns + 2.2, (0.28 * len(names) + 1.2) * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        for place, name in enumerate(names):
            for equal, shift, face in (("steps", -0.13, "C0"), ("time", 0.13, "white")):
                found = group.difference(name, equal)
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
