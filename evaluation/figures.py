"""The report's figures: bars per meta-task with intervals, and quality against embedding size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.scores import OVERALL, Mean, ModelScores

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


def size_plot(models: Sequence[ModelScores], means: Sequence[Mapping[str, Mean]], path: Path) -> bool:
    """Write quality against embedding size.

    Args:
        models: The models.
        means: `summarize` of each.
        path: PNG to write.

    Returns:
        Whether it was written: at least two models must state their size.
    """
    points = [
        (int(model.metadata["embed_dim"]), mean[OVERALL], model.name)
        for model, mean in zip(models, means, strict=True)
        if model.metadata.get("embed_dim") and mean[OVERALL].present
    ]
    if len(points) < 2:
        return False
    figure = Figure(figsize=(5, 3.6), dpi=150)
    axes = figure.add_subplot()
    for number, (size, mean, name) in enumerate(points):
        axes.errorbar(size, 100 * mean.value, 196 * mean.standard_error, fmt="o", color=COLOURS[number % 6], capsize=3)
        axes.annotate(name, (size, 100 * mean.value), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("numbers per embedding")
    axes.set_ylabel("mean over data sets (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    return True
