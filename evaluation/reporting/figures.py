"""The report's figures: bars per meta-task with intervals, and quality against embedding size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.reporting.scores import Mean, ModelScores

COLOURS = ("#2f5d8a", "#d98032", "#4f8f5b", "#a3455c", "#7a6aa8", "#6b6b6b")


def group_bars(
    models: Sequence[ModelScores], means: Sequence[Mapping[str, Mean]], chance: Mapping[str, float], path: Path
) -> None:
    """Write bars per group, models side by side, with 95 % intervals and chance levels.

    Args:
        models: The models, in the order of the bars.
        means: `summarize` of each.
        chance: Label -> chance level; labels without one get no mark.
        path: PNG to write.
    """
    labels = [label for label in means[0] if any(mean[label].present for mean in means)]
    figure = Figure(figsize=(max(7.0, 0.55 * len(labels) * (1 + len(models) / 3)), 4.2), dpi=150)
    axes = figure.add_subplot()
    places, width = np.arange(len(labels)), 0.8 / len(models)
    for number, (model, mean) in enumerate(zip(models, means, strict=True)):
        values = [100 * mean[label].value for label in labels]
        errors = [196 * mean[label].standard_error for label in labels]
        hatches = ["" if mean[label].complete else "//" for label in labels]
        left = places + (number - (len(models) - 1) / 2) * width
        bars = axes.bar(left, values, width, yerr=errors, capsize=2, color=COLOURS[number % 6], label=model.name)
        for bar, hatch in zip(bars, hatches, strict=True):
            bar.set_hatch(hatch)
    for place, label in zip(places, labels, strict=True):
        if label in chance:
            axes.hlines(100 * chance[label], place - 0.4, place + 0.4, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(places, labels, rotation=30, ha="right")
    axes.set_ylabel("score (%)")
    axes.set_ylim(0, 100)
    axes.set_title(f"split {models[0].split_label}; dotted: chance; hatched: incomplete; bars: 95 %", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def size_plot(curves: Mapping[str, Mapping[int, Mean]], path: Path) -> None:
    """Write quality against embedding size, a curve per model, with 95 % intervals.

    Args:
        curves: Model -> numbers per embedding -> mean over all data sets.
        path: PNG to write.
    """
    figure = Figure(figsize=(6, 4), dpi=150)
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        sizes = sorted(curve)
        values = [100 * curve[size].value for size in sizes]
        errors = [196 * curve[size].standard_error for size in sizes]
        colour, marker = COLOURS[number % 6], "os^Dv*"[number % 6]
        axes.errorbar(sizes, values, errors, capsize=3, linewidth=1.5, label=name, color=colour, marker=marker)
    ticks = sorted({size for curve in curves.values() for size in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("numbers per embedding")
    axes.set_ylabel("mean over data sets (%)")
    axes.set_title("bars: 95 % over queries", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
