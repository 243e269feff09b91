"""The benchmarks by name: each is a module `recipes.benchmark_NAME` with a `main()` and its own `--help`.

`python -m recipes.benchmark step` times a training step, `python -m recipes.benchmark encode` the encoding;
`encode_scale` shows that time per row and memory stay flat, `encode_cost` what the BToks cost.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def names() -> list[str]:
    """What can be measured: the modules that stand beside this one."""
    return sorted(path.stem.removeprefix("benchmark_") for path in Path(__file__).parent.glob("benchmark_*.py"))


def main() -> None:
    """Hand the command line on to the benchmark that its first word names."""
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        sys.exit(f"usage: python -m recipes.benchmark {{{','.join(names())}}} [--help]")
    name = sys.argv.pop(1)
    importlib.import_module(f"recipes.benchmark_{name}").main()


if __name__ == "__main__":
    main()
