"""What the benchmarks share: ways that take turns, and the memory and time of a process.

Ratios are taken within a round, of CPU time of one thread: other work on the machine hardly changes them.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm

Found = TypeVar("Found")


def rounds_of(ways: Mapping[str, Callable[[], Found]], rounds: int, warm: int = 0) -> list[dict[str, Found]]:
    """Run every way once a round; the order turns from round to round, so that none is always the first.

    The results of the first `warm` rounds are dropped. Returns what each way returned, by name, for every round.
    """
    names, found = list(ways), []
    for number in tqdm(range(warm + rounds), desc="rounds"):
        turn = number % len(names)
        found.append({name: ways[name]() for name in names[turn:] + names[:turn]})
    return found[warm:]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process for a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def seconds_of(ways: Mapping[str, Callable[[], object]], rounds: int, warm: int = 0) -> dict[str, list[float]]:
    """CPU seconds of each way in each round; arguments as those of `rounds_of`."""
    found = rounds_of({name: partial(cpu_seconds, work) for name, work in ways.items()}, rounds, warm)
    return {name: [results[name] for results in found] for name in ways}


def ratios(seconds: Mapping[str, Sequence[float]], way: str, other: str) -> list[float]:
    """Time of a way over that of another, round by round."""
    return [mine / theirs for mine, theirs in zip(seconds[way], seconds[other], strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@contextmanager
def added_memory() -> Iterator[Callable[[], float]]:
    """What the block adds to this process at its peak.

    Yields:
        A function that tells it afterwards, in MiB.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def peak() -> float:
        status = Path("/proc/self/status").read_text().splitlines()
        highest = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        return highest / 2**10 - before

    yield peak
