"""mteb's own benchmarks with any model: MIEB, ViDoRe up to V3, MVEB and the others that mteb has, from local data too.

mteb 2.26 has no MMEB; its newest with pictures and videos are `MIEB(...)`, `ViDoRe(v3)`, `ViDoRe(v3.1)`, `JinaVDR` and
`MVEB(...)`. Audio (`MAEB`) needs a model that hears.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
from mteb import Benchmark

from evaluation.mmeb_v2.sources import local_version
from evaluation.reporting.scores import STOCK


def stock_benchmark(name: str, subset: Sequence[str] | None = None, data: str | Path | None = None) -> Benchmark:
    """One of mteb's benchmarks, or a part of it.

    Args:
        name: Its name for `mteb.get_benchmark`.
        subset: Tasks to keep, by name; default all.
        data: Folder with hub snapshots as `<owner>/<name>`, each with its card (`README.md`), which says where the
            files of a configuration are. Tasks whose data set lies there read it; the others ask the hub.

    Returns:
        The benchmark; nothing is read yet.

    Raises:
        ValueError: `subset` names a task that the benchmark doesn't have.
    """
    benchmark = mteb.get_benchmark(name)
    tasks = list(benchmark.tasks)
    unknown = sorted(set(subset or ()) - {task.metadata.name for task in tasks})
    if unknown:
        names = sorted(task.metadata.name for task in tasks)
        raise ValueError(f"{name} has no tasks {unknown}: it has {names}")
    tasks = [_local(task, data) for task in tasks if subset is None or task.metadata.name in subset]
    part = copy.copy(benchmark)  # the tasks of mteb's own object are shared by everybody who asks for it
    part.tasks = tasks
    return part


def _local(task: Any, data: str | Path | None) -> Any:
    """The task, reading its data set below a folder if it is there; only this object is changed."""
    source = task.metadata.dataset
    place = Path(data or "") / source["path"]
    if data is None or not place.is_dir():
        return task
    task = copy.copy(task)
    found = {**source, "path": str(place.resolve()), "revision": local_version(place)}
    task.metadata = task.metadata.model_copy(update={"dataset": found})
    return task


def stock_suite(benchmark: Benchmark) -> dict[str, tuple[str, str]]:
    """The tasks of a benchmark as a report needs them.

    Args:
        benchmark: One of mteb's.

    Returns:
        Task -> (`mteb`, its type).
    """
    return {task.metadata.name: (STOCK, task.metadata.type) for task in benchmark.tasks}


def stock_parts(benchmark: Benchmark) -> dict[str, set[tuple[str, str]]]:
    """What a benchmark asks of its tasks; other benchmarks ask other languages of the same ones.

    Args:
        benchmark: One of mteb's.

    Returns:
        Task -> its splits and subsets.
    """
    found = {}
    for task in benchmark.tasks:
        subsets = ["default"] if task.is_aggregate else task.hf_subsets
        found[task.metadata.name] = {(split, subset) for split in task.eval_splits for subset in subsets}
    return found
