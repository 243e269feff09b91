"""The quickstart: from the shipped backbone to a searchable BTok model, offline, in minutes on two CPU cores.

    python -m recipes.quickstart

1. Trains the backbone with `BTokLoss` and, with the same data, steps and seeds, with last-token pooling; scores both
   on held-out words before and after, and prints the comparison (the code of `recipes.compare`, `toy/quickstart.py`).
2. Saves `btok-quickstart/`, loads it with plain sentence-transformers in a process that can't import `st_btok`,
   checks that the embeddings are equal, and draws a search in both directions (`search.png`) and the comparison with
   the loss curves (`comparison.png`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from recipes.command_line import option, parse, run

# Each is a variant of `toy/quickstart.py`.
NAMES = ("last token", "BToks", "BToks, no condensation loss")


@dataclass
class QuickstartConfig:
    """Settings of the quickstart; the defaults are what `make quickstart` runs."""

    backbone: str = option(str(Path(__file__).parent / "backbone"), "A small pre-trained model; the shipped one.")
    output_dir: str = option("btok-quickstart", "Folder of the model, tables and pictures.")
    seeds: int = option(2, "Seeds 0 to N-1 of each variant.")
    steps: int = option(40, "Training steps.")
    batch_size: int = option(64, "Pairs a step.")
    learning_rate: float = option(5e-4, "Peak learning rate.")
    split: str = option("test", "Words that are scored: test or validation.")
    max_candidates: int | None = option(None, "At most so many words are scored.")
    variants: list[str] = option(list(NAMES[:2]), f"Of {', '.join(NAMES)}; the first is the baseline.")

    def __post_init__(self) -> None:
        """Refuse names that mean nothing before anything is trained."""
        if unknown := [name for name in self.variants if name not in NAMES]:
            raise ValueError(f"variants must be of {list(NAMES)}, got {unknown}.")
        if all(not name.startswith("BToks") for name in self.variants):
            raise ValueError(f"one of the variants must have BToks, whose model is kept, got {self.variants}.")


def main() -> None:
    """Run the quickstart with the settings of the command line."""
    config = parse(QuickstartConfig, description=__doc__)
    run(lambda: import_module("recipes.toy.quickstart").main(config))


if __name__ == "__main__":
    main()
