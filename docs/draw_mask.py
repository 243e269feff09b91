"""Draws `docs/mask.png`, the mask of one joint row `[input][BToks][target]`: `python -m docs.draw_mask`.

Every cell is asked of `condensation_mask` itself, so the picture can't say something else than the code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from st_btok import condensation_mask

INPUT = ["<image>", "<image>", "what", "tool", "?", "<end>"]
BTOKS = [f"<|btok_{number}|>" for number in range(4)]
TARGET = ["a", "claw", "hammer", "<end>"]
COLOURS = ListedColormap(["#f3f3f3", "#9ec5e8", "#f2b45c", "#7fbf7b", "#d9584a"])
HIDDEN, SEES_INPUT, SEES_BTOK, SEES_TARGET, CUT = range(5)


def cells(segments: torch.Tensor) -> torch.Tensor:
    """Colour of each (query, key): what is seen there, or who forbids it; (T, T).

    Args:
        segments: (T,) with 0 for the input, 1 for BToks and 2 for the target.

    Returns:
        `HIDDEN` for the future, `CUT` for what the condensation mask takes away, else what the key is.
    """
    position = torch.arange(len(segments))
    query, key = position[:, None], position[None]
    batch = torch.zeros_like(query)
    allowed = condensation_mask(segments[None])(batch, batch, query, key)
    colours = SEES_INPUT + segments[None].expand(len(segments), -1)
    colours = torch.where(allowed, colours, CUT)
    return torch.where(key <= query, colours, HIDDEN)


def main() -> None:
    """Write the picture."""
    names = INPUT + BTOKS + TARGET
    segments = torch.tensor([0] * len(INPUT) + [1] * len(BTOKS) + [2] * len(TARGET))
    figure = Figure(figsize=(7.6, 7.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(cells(segments).numpy(), cmap=COLOURS, vmin=0, vmax=4)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set_xticks([edge + 0.5 for edge in range(len(names) - 1)], minor=True)
    axis.set_yticks([edge + 0.5 for edge in range(len(names) - 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.set_xlabel("is read (key)")
    axis.set_ylabel("reads (query)")
    labels = {SEES_INPUT: "reads the input", SEES_BTOK: "reads a BTok", SEES_TARGET: "reads earlier target tokens"}
    labels |= {CUT: "cut by the condensation mask", HIDDEN: "the future"}
    for colour, label in labels.items():
        axis.scatter([], [], marker="s", s=90, color=COLOURS(colour), edgecolors="#bbbbbb", label=label)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(Path(__file__).parent / "mask.png", dpi=80)


if __name__ == "__main__":
    main()
