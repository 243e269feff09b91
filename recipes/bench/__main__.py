"""The benchmarks by name: each is a module of this folder with a `main` that takes its settings (`settings.py`).

`python -m recipes.bench step` times a training step, `python -m recipes.bench encode` the encoding; `encode_scale`
shows that time per row and memory stay flat, `encode_cost` what the BToks cost, `preprocess` what the chat template
costs, `operations` counts what a step starts, `memory` computes what it needs on a GPU, and `crash_test` kills corpus
jobs.
"""

from __future__ import annotations

import sys
from importlib import import_module

from recipes.bench.settings import BENCHMARKS
from recipes.command_line import parse, run


def main() -> None:
    """Hand the flags on to the benchmark that the first word names."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        sys.exit(f"usage: python -m recipes.bench {{{','.join(BENCHMARKS)}}} [--help]")
    name = sys.argv[1]
    config = parse(BENCHMARKS[name], sys.argv[2:])
    run(lambda: import_module(f"recipes.bench.{name}").main(config))


if __name__ == "__main__":
    main()
