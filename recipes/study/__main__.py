"""The study: what each part of the method is worth on real pairs.

    python -m recipes.study --quick
    python -m recipes.study --quick --corpora stamps
    python -m recipes.study --backbones smollm2:12 --corpora packages words --seeds 5 --rates 3e-4 1e-3 3e-3

First a step of every variant is timed, alone. Then, for every backbone, corpus and variant: the best learning rate on
validation (where several are given), and every seed on the test split, at equal steps and, for variants whose steps
cost more or less than the baseline's, at equal time. The plan and its estimated time are printed first. Stop it and
start it again: it goes on. `--only costs` stops after the timing; `--only table` writes the tables and figures again
from `runs.jsonl`. On a GPU, `--workers 8` makes eight runs at a time.
"""

from __future__ import annotations

from importlib import import_module

from recipes.command_line import parse, run
from recipes.study.settings import StudyConfig


def main() -> None:
    """Run the study with the settings of the command line."""
    config = parse(StudyConfig, description=__doc__)
    run(lambda: import_module("recipes.study.study").main(config))


if __name__ == "__main__":
    main()
