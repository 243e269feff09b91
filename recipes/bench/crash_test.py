"""Kill a corpus job again and again and compare what it leaves with an unbroken run, bit by bit.

    python -m recipes.bench crash_test --kills 20

Each job is a process of its own that ends by SIGKILL at a random time: one in four while it starts, the others within
what a few shards take after that; the next one goes on in the same folder. The last is left alone. With `--together 2`
two jobs run at a time in one folder and both are killed, one after the other. The model is the quickstart's backbone
with BToks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from recipes.bench.encode import load_model
from recipes.bench.encode_scale import rows_of
from recipes.bench.settings import KillsConfig
from recipes.data.corpus import open_corpus
from recipes.data.shards import encode_shard, plan
from recipes.encode_corpus import EncodeConfig

_SHARDS = 6  # that a killed job could write at most


def job(config: EncodeConfig, model: SentenceTransformer) -> None:
    """What `recipes.encode_corpus` does once its model is loaded."""
    corpus = open_corpus(config.data)
    for shard in plan(config, corpus, model):
        if not Path(shard.path).exists():
            encode_shard(model, corpus, shard, config)


def start(config: EncodeConfig, model: SentenceTransformer) -> multiprocessing.Process:
    """The job as a process, forked so that it needs not load the model."""
    process = multiprocessing.get_context("fork").Process(target=job, args=(config, model))
    process.start()
    return process


def kill_often(
    config: EncodeConfig,
    model: SentenceTransformer,
    kills: int,
    together: int,
    startup: float,
    work: float,
    seed: int = 0,
) -> tuple[int, int]:
    """Kill jobs in one folder, `together` at a time, until that hit often enough or all is written; let one finish.

    A job takes `startup` seconds to start, and the killed one works at most `work` seconds after that.

    Returns:
        Kills that hit a running job, and shards that were there after the last of them.
    """
    draw = random.Random(seed)
    hit = 0
    for _ in range(10 * kills):
        if hit == kills:
            break
        jobs = [start(config, model) for _ in range(together)]
        is_early = draw.random() < 0.25
        time.sleep(draw.uniform(0, startup) if is_early else startup + draw.uniform(0, work))
        if jobs[0].is_alive():
            os.kill(jobs[0].pid or 0, signal.SIGKILL)
            hit += 1
        jobs[0].join()
        for other in jobs[1:]:
            time.sleep(draw.uniform(0, work / 4))
            other.kill()  # or the corpus would be done before the next kill
            other.join()
    written = len(list(Path(config.output_dir).glob("shard-*.parquet")))
    last = start(config, model)
    last.join()
    if last.exitcode:
        raise RuntimeError(f"the job that was left alone ended with {last.exitcode}. Run recipes.encode_corpus on it.")
    return hit, written


def same_shards(first: Path, second: Path) -> int:
    """Number of shards of two folders that are equal, bit by bit; a `ValueError` if one differs or is unfinished."""
    names = [sorted(path.name for path in folder.glob("shard-*.parquet")) for folder in (first, second)]
    left = [path.name for path in first.glob("*.unfinished")]
    different = [name for name in names[0] if not pq.read_table(first / name).equals(pq.read_table(second / name))]
    if names[0] != names[1] or different or left:
        raise ValueError(f"the folders must be equal, these shards differ: {different}, these are left over: {left}.")
    return len(names[0])


def main(config: KillsConfig) -> None:
    """Kill and compare."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows_of(config.rows, Path(place))))
        model = load_model()
        whole = EncodeConfig("", [str(corpus)], str(Path(place) / "whole"), shard_size=config.shard_size)
        broken = EncodeConfig("", [str(corpus)], str(Path(place) / "broken"), shard_size=config.shard_size)
        seconds = []
        for _ in range(2):  # the second finds nothing to do
            begun = time.monotonic()
            start(whole, model).join()
            seconds.append(time.monotonic() - begun)
        work = _SHARDS * (seconds[0] - seconds[1]) * config.shard_size / config.rows
        hit, written = kill_often(broken, model, config.kills, config.together, seconds[1], work, config.seed)
        shards = same_shards(Path(broken.output_dir), Path(whole.output_dir))
    print(
        f"{hit} kills, {config.together} at a time; {written} of {shards} shards were written after the last; all "
        f"{shards} are equal to those of an unbroken run, bit by bit."
    )
