"""Time per row and peak memory of `encode_checked` and `encode_corpus` as the rows grow: both should stay flat.

    python -m recipes.bench encode_scale

Rows are short texts, every tenth with a small picture by path; none equals another. Each size runs in a process of its
own, where the model is loaded and warm; memory is what encoding adds to it at its peak, rows aside. `encode_checked`
returns all embeddings at once, so what they take is shown apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.markdown import table
from recipes.bench.encode import load_model, texts
from recipes.bench.paired import added_memory
from recipes.bench.settings import ScaleConfig
from recipes.data.corpus import open_corpus
from recipes.data.shards import encode_shard, plan
from recipes.encode_corpus import EncodeConfig
from st_btok import encode_checked

_PICTURES = 100


def rows_of(count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Different rows; pictures repeat, the texts beside them do not."""
    for number in range(_PICTURES):
        noise = np.random.default_rng(number).integers(0, 255, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    for number, text in enumerate(texts(count, 2, 8)):
        row = {"text": f"{number} {text}"}
        yield {"image": str(folder / f"{number // 10 % _PICTURES}.png"), **row} if number % 10 == 0 else row


def prepare(way: str, model: Any, rows: Iterator[dict[str, Any]], folder: Path) -> Callable[[], float]:
    """The rows in their place, and what embeds them and tells how many MiB it returns."""
    if way == "encode_checked":
        listed = list(rows)
        return lambda: encode_checked(model, listed).embeddings.nbytes / 2**20
    path = folder / "corpus.jsonl"
    with path.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)

    def embed() -> float:
        config = EncodeConfig("", [str(path)], str(folder / "embeddings"))
        corpus = open_corpus(config.data)
        for shard in plan(config, corpus, model):
            encode_shard(model, corpus, shard, config)
        return 0.0

    return embed


def measure(way: str, count: int) -> tuple[float, float, float]:
    """Milliseconds a row, MiB added at the peak, and MiB of them that are returned; for a process of its own."""
    model = load_model()
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as folder:
        prepare(way, model, rows_of(200, Path(warm)), Path(warm))()
        embed = prepare(way, model, rows_of(count, Path(folder)), Path(folder))
        with added_memory() as added:
            start = time.process_time()
            returned = embed()
            seconds = time.process_time() - start
    return 1000 * seconds / count, added(), returned


def main(config: ScaleConfig) -> None:
    """Run the benchmark and write its table."""
    if config.worker:
        print(*measure(config.worker, config.rows[0]))
        return
    rows = []
    for way in config.ways:
        for count in config.rows:
            command = [sys.executable, "-m", "recipes.bench", "encode_scale", "--worker", way, "--rows", str(count)]
            out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            took, peak, returned = map(float, out.split()[-3:])
            rows.append([way, f"{count:,}", f"{took:.2f}", f"{peak:.0f}", f"{returned:.0f}"])
    title = f"`python -m recipes.bench encode_scale --rows {' '.join(map(str, config.rows))}`, one thread."
    head = ["way", "rows", "CPU ms a row", "peak MiB", "of them embeddings that are returned"]
    text = f"{title}\n\n{table(head, rows, numbers=True)}\n"
    Path(config.output).write_text(text)
    print(text)
