"""Runs, one after another or several at a time, each of which may fail without taking the others along."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from recipes.research.variant import VariantSettings
from recipes.research.variants import quiet
from recipes.study.inputs import Corpus, backbone_folder, load_corpus
from recipes.study.runs import Wanted, make_run
from recipes.study.settings import StudyConfig


@dataclass(frozen=True)
class Job:
    """A run with all that it needs.

    Args:
        wanted: The run.
        config: Settings of the study.
    """

    wanted: Wanted
    config: StudyConfig

    @property
    def title(self) -> str:
        """What it is called while it runs."""
        run = self.wanted
        return f"{run.backbone}, {run.corpus}, {run.variant}, seed {run.seed}, {run.steps} steps at {run.rate:g}"

    @property
    def settings(self) -> VariantSettings:
        """What it shares with the other variants."""
        config, folder = self.config, Path(self.config.output_dir)
        return VariantSettings(
            backbone_folder(self.wanted.backbone, folder),
            self.wanted.steps,
            batch_size=self.wanted.batch_size,
            tuning=config.tuning,
            build={
                "max_seq_length": config.max_seq_length,
                "model_kwargs": {"dtype": getattr(torch, config.dtype)},
            },
            device=config.device,
            bf16=config.bf16,
        )

    def corpus(self) -> Corpus:
        """Its corpus, read once by each process."""
        config = self.config
        limits = config.limit, config.candidates
        return _corpus(self.wanted.corpus, Path(config.output_dir) / "corpora", Path(config.cache), *limits)

    def make(self) -> dict[str, Any]:
        """Train and score; the line for the log."""
        start = time.perf_counter()
        line = make_run(self.wanted, self.settings, self.corpus(), self.title)
        return line | {"seconds": round(time.perf_counter() - start, 1)}


_corpus = lru_cache(maxsize=8)(load_corpus)


def made(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    """Do all jobs, `workers` at a time (1: in this process); yields each with its line, or its error, as it ends."""
    if workers == 1:
        yield from ((job, _attempt(job)) for job in jobs)
        return
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would write over each other
    context = multiprocessing.get_context("spawn")  # a forked process can't use a GPU
    with ProcessPoolExecutor(workers, context, _start, (max(1, (os.cpu_count() or 1) // workers),)) as pool:
        waiting = {pool.submit(_attempt, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _attempt(job: Job) -> dict[str, Any] | Exception:
    try:
        return job.make()
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        return RuntimeError(f"{type(error).__name__}: {error}")  # a plain one, which can be sent between processes


def _start(threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    quiet()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True


def _end_with_parent() -> None:
    """A study that is killed takes its workers along; by itself a worker would end its run first."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
