"""Time, padding and memory of encoding: stock `encode`, `encode_checked` and `encode_corpus` on the same rows.

    python -m recipes.bench encode

The mixed corpus has 600 rows: short and long texts, images of many sizes as objects, as paths, and with text. Peak
memory is what encoding adds to a process of its own, where the model is loaded and warm. The model is the backbone of
the quickstart with BToks, in float32: its saved half precision gives vectors that differ by 4e-4 with the batch they
run in, stock's too.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from sentence_transformers import SentenceTransformer

from evaluation.markdown import table
from recipes.bench.paired import added_memory, cpu_seconds, ratios, seconds_of, spread
from recipes.bench.settings import EncodeBenchmarkConfig
from recipes.data.corpus import open_corpus
from recipes.data.shards import encode_shard, plan, read_embeddings
from recipes.encode_corpus import EncodeConfig
from st_btok import build_model, encode_checked

_HERE = Path(__file__).parent.parent
_SIZES = ((28, 28), (56, 56), (112, 84), (224, 224), (320, 96), (640, 480))
WAYS = ("encode", "encode_checked", "encode_corpus")


def load_model() -> SentenceTransformer:
    """The model that is timed."""
    torch.set_num_threads(1)
    return build_model(str(_HERE / "backbone"), device="cpu").float()


def texts(count: int, min_words: int, max_words: int, seed: int = 0) -> list[str]:
    """Texts of random words."""
    words, draw = (_HERE / "toy" / "words.txt").read_text().split(), random.Random(seed)
    return [" ".join(draw.choice(words) for _ in range(draw.randint(min_words, max_words))) for _ in range(count)]


def mixed_rows(count: int, folder: Path) -> list[Any]:
    """A sixth each: short texts twice, long texts, images, paths with text, paths."""
    draw = random.Random(0)
    short, long = texts(count, 2, 8), texts(count, 40, 150, seed=1)
    rows: list[Any] = []
    for number in range(count):
        width, height = draw.choice(_SIZES)
        noise = np.random.default_rng(number).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
        image, path = PILImage.fromarray(noise).resize((width, height)), folder / f"{number}.png"
        image.save(path)
        kinds = (
            short[number],
            short[number],
            long[number],
            image,
            {"image": str(path), "text": short[number]},
            str(path),
        )
        rows.append(kinds[number % 6])
    draw.shuffle(rows)
    return rows


def as_corpus(rows: list[Any], path: Path) -> None:
    """The same rows as a Parquet file; images that are objects are embedded in it."""
    columns: dict[str, list[Any]] = {"image": [], "text": []}
    for row in rows:
        image = row.get("image") if isinstance(row, dict) else None
        if isinstance(row, PILImage.Image) or (isinstance(row, str) and row.endswith(".png")):
            image = row
        text = row.get("text") if isinstance(row, dict) else row if image is None else None
        columns["image"].append({"path": image, "bytes": None} if isinstance(image, str) else image)
        columns["text"].append(text)
    Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")})).to_parquet(str(path))


class Counted:
    """A model whose forward passes are counted: padded and real tokens."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.padded = self.real = 0
        self.forward, model.forward = model.forward, self

    def __call__(self, features: dict[str, Any], **kwargs: Any) -> Any:
        """The model's forward pass."""
        self.padded += features["attention_mask"].numel()
        self.real += int(features["attention_mask"].sum())
        return self.forward(features, **kwargs)


def run_way(way: str, model: SentenceTransformer, rows: list[Any], corpus: Path) -> np.ndarray:
    """Embed the rows by one of the ways."""
    if way == "encode":
        return model.encode(rows)
    if way == "encode_checked":
        return encode_checked(model, rows).embeddings
    with tempfile.TemporaryDirectory() as folder:
        config = EncodeConfig("", [str(corpus)], folder)
        opened = open_corpus(config.data)
        for shard in plan(config, opened, model):
            encode_shard(model, opened, shard, config)
        return np.array([row["embedding"] for row in read_embeddings(folder)], np.float32)


def peak(way: str, rows: list[Any], corpus: Path) -> float:
    """MiB that encoding adds to this process at its peak."""
    model = load_model()
    run_way(way, model, rows[:8], corpus) if way != "encode_corpus" else model.encode(rows[:8])
    with added_memory() as added:
        run_way(way, model, rows, corpus)
    return added()


def mixed_table(config: EncodeBenchmarkConfig, model: SentenceTransformer, rows: list[Any], corpus: Path) -> str:
    """Time, padding, memory and equality on the mixed corpus."""
    counted, padding, vectors, memory = Counted(model), {}, {}, {}
    for way in WAYS:
        counted.padded = counted.real = 0
        vectors[way] = run_way(way, model, rows, corpus)
        padding[way] = counted.padded / counted.real
        command = [sys.executable, "-m", "recipes.bench", "encode", "--worker", way, "--rows", str(config.rows)]
        memory[way] = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])
    del model.forward
    seconds = seconds_of({way: partial(run_way, way, model, rows, corpus) for way in WAYS}, config.rounds)
    lines = []
    for way in WAYS:
        difference = float(np.abs(vectors[way] - vectors["encode"]).max())
        cells = [spread(ratios(seconds, way, "encode")), f"{np.median(seconds[way]):.1f}", f"{padding[way]:.2f}"]
        lines.append([way, *cells, f"{memory[way]:.0f}", f"{difference:.0e}"])
    head = ["way", "time / encode", "CPU seconds", "padded / real tokens", "peak MiB", "largest difference"]
    return f"{len(rows)} mixed rows, {config.rounds} paired rounds.\n\n{table(head, lines, numbers=True)}\n"


def short_table(config: EncodeBenchmarkConfig, model: SentenceTransformer) -> str:
    """Short texts: against stock, and time per row over the number of rows."""
    rows = texts(10 * config.short, 2, 8)
    few = rows[: config.short]
    ways = {"encode": lambda: model.encode(few), "encode_checked": lambda: encode_checked(model, few)}
    seconds = seconds_of(ways, config.rounds)
    ratio = spread(ratios(seconds, "encode_checked", "encode"))
    each = 1000 * float(np.median(seconds["encode"])) / config.short
    title = f"{config.short:,} short texts: `encode_checked` takes {ratio} of `encode`'s time ({each:.2f} ms a row)."
    lines = []
    for times in (1, 2, 5, 10):
        part = rows[: times * config.short]
        took = cpu_seconds(lambda part=part: encode_checked(model, part))
        lines.append([f"{len(part):,}", f"{1000 * took / len(part):.2f}"])
    return f"{title}\n\n{table(['rows', 'encode_checked, ms a row'], lines, numbers=True)}\n"


def main(config: EncodeBenchmarkConfig) -> None:
    """Run the benchmark and write its tables."""
    with tempfile.TemporaryDirectory() as folder:
        rows, corpus = mixed_rows(config.rows, Path(folder)), Path(folder) / "corpus.parquet"
        as_corpus(rows, corpus)
        if config.worker:
            print(peak(config.worker, rows, corpus))
            return
        model = load_model()
        settings = {key: value for key, value in asdict(config).items() if key not in ("output", "worker")}
        title = f"`python -m recipes.bench encode`, {json.dumps(settings)}, one thread.\n"
        text = "\n".join([title, mixed_table(config, model, rows, corpus), short_table(config, model)])
    Path(config.output).write_text(text)
    print(text)
