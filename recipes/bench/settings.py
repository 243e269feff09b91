"""Flags of the benchmarks; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.command_line import option

BACKBONE = Path(__file__).parent.parent / "backbone"


@dataclass
class BenchmarkConfig:
    """Sizes of the benchmark."""

    backbones: str = option("qwen2_vl,llama", "Of qwen2_vl and llama.")
    batch_size: int = option(16, "Pairs per step.")
    mini_batch_size: int = option(4, "Rows per pass of the cached loss.")
    target_words: int = option(4, "Mean words of a target, which has 1 to twice as many less 1; about 7 tokens each.")
    vocab_size: int = option(151_936, "Rows of the embedding matrix; Qwen2-VL's by default.")
    hidden_size: int = option(192, "Width of the backbone.")
    steps: int = option(3, "Timed steps of a run, after one that is not timed.")
    rounds: int = option(5, "Paired repetitions.")
    batches: str = option("16,32,64", "Batch sizes of the table of memory, one run each.")
    output: str = option("recipes/results/benchmark.md", "Where the table goes.")
    worker: str = option("", "Used by the command itself: one way to run in this process.")


@dataclass
class EncodeBenchmarkConfig:
    """Sizes of the benchmark."""

    rows: int = option(600, "Rows of the mixed corpus.")
    short: int = option(1000, "Short texts; then up to ten times as many.")
    rounds: int = option(3, "Paired repetitions.")
    output: str = option("recipes/results/encode.md", "Where the table goes.")
    worker: str = option("", "Used by the command itself: one way to run in this process.")


@dataclass
class CostConfig:
    """Sizes of the benchmark."""

    hidden: list[int] = option([448, 768], "Widths of the backbones.")
    layers: int = option(12, "Layers of the backbones.")
    lengths: list[int] = option([65, 128], "L, tokens of an input.")
    btoks: int = option(4, "K.")
    rows: int = option(32, "Inputs, in batches of 16.")
    rounds: int = option(5, "Paired repetitions.")
    output: str = option("recipes/results/encode_cost.md", "Where the table goes.")


@dataclass
class ScaleConfig:
    """Sizes of the benchmark."""

    rows: list[int] = option([1000, 10_000, 50_000], "Numbers of rows.")
    ways: list[str] = option(["encode_checked", "encode_corpus"], "What is measured.")
    output: str = option("recipes/results/encode_scale.md", "Where the table goes.")
    worker: str = option("", "Used by the command itself: one way to run in this process.")


@dataclass
class KillsConfig:
    """How often, and what."""

    kills: int = option(20, "Jobs that are killed.")
    together: int = option(1, "Jobs that run at a time.")
    rows: int = option(600, "Rows of the corpus.")
    shard_size: int = option(20, "Rows of a shard.")
    seed: int = option(0, "Of the times.")


@dataclass
class OperationsConfig:
    """What is counted."""

    batches: str = option("16,64", "Pairs per step.")
    mini_batch_size: int = option(8, "Rows per pass of the cached losses.")
    output: str = option("recipes/results/operations.md", "Where the table goes.")


@dataclass
class PreprocessConfig:
    """Sizes of the benchmark."""

    backbone: str = option(str(BACKBONE), "Name or path.")
    max_seq_length: int = option(512, "Limit of both, in tokens.")
    rounds: int = option(9, "Paired rounds.")


@dataclass
class MemoryConfig:
    """What is computed."""

    batch_size: int = option(64, "Pairs a step.")
    mini_batch_size: int = option(8, "Rows in memory at a time, as in CachedBTokLoss.")
    rank: int = option(16, "Rank of LoRA on all linear layers of the decoder.")
    write: str = option("", "A Markdown file whose table is replaced.")


# Every benchmark by its name, which is its module's.
BENCHMARKS = {
    "step": BenchmarkConfig,
    "encode": EncodeBenchmarkConfig,
    "encode_cost": CostConfig,
    "encode_scale": ScaleConfig,
    "crash_test": KillsConfig,
    "operations": OperationsConfig,
    "preprocess": PreprocessConfig,
    "memory": MemoryConfig,
}
