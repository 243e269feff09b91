"""The benchmarks by name: each is a module of this folder with a `main()` and its own `--help`.

`python -m recipes.bench step` times a training step, `python -m recipes.bench encode` the encoding; `encode_scale`
shows that time per row and memory stay flat, `encode_cost` what the BToks cost, `preprocess` what the chat template
costs, and `crash_test` kills corpus jobs.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def names() -> list[str]:
    """What can be measured: the modules that stand beside this one."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def main() -> None:
    """Hand the command line on to the benchmark that its first word names."""
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        sys.exit(f"usage: python -m recipes.bench {{{','.join(names())}}} [--help]")
    name = sys.argv.pop(1)
    importlib.import_module(f"recipes.bench.{name}").main()


if __name__ == "__main__":
    main()
