"""Step time and peak memory of the losses, as ratios of paired runs.

    python -m recipes.benchmark

Five ways to train on the same batch of (image or text, text) pairs with a small backbone that has a large vocabulary:
`mnrl` (ranking alone, through the same BTok model), `btok`, `cached`, `kv` (`BTokLoss(route="kv")`) and `naive`: a
second call of the model on `[input][BToks][target]`, with logits for every position, as a causal LM with labels does
(and without the condensation mask, which costs nothing). Each round runs every way once, each in a process of its own,
so that peak memory is its own; ratios are taken within a round. Memory is what a step adds to the process at its peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    AutoProcessor,
    HfArgumentParser,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLModel,
)

from recipes import pairs
from st_btok import BTokLoss, CachedBTokLoss, build_model

BACKBONE = Path(__file__).parent / "backbone"
WAYS = ("mnrl", "btok", "kv", "cached", "naive")


@dataclass
class BenchmarkConfig:
    """Sizes of the benchmark."""

    backbones: str = field(default="qwen2_vl,llama", metadata={"help": "Of qwen2_vl and llama."})
    batch_size: int = field(default=16, metadata={"help": "Pairs per step."})
    mini_batch_size: int = field(default=4, metadata={"help": "Rows per pass of the cached loss."})
    target_words: int = field(default=4, metadata={"help": "Words of each target; about 7 tokens each."})
    vocab_size: int = field(default=151_936, metadata={"help": "Rows of the embedding matrix; Qwen2-VL's by default."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the backbone."})
    steps: int = field(default=3, metadata={"help": "Timed steps of a run, after one that is not timed."})
    rounds: int = field(default=5, metadata={"help": "Paired repetitions."})
    output: str = field(default="recipes/results/benchmark.md", metadata={"help": "Where the table goes."})
    worker: str = field(default="", metadata={"help": "Used by the command itself: one way to run in this process."})


def backbone(config: BenchmarkConfig, family: str) -> SentenceTransformer:
    """A random BTok model of a family, with a tokenizer of bytes and a large embedding matrix."""
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(BACKBONE)
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": 3 * config.hidden_size,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    if family == "llama":
        own_tokenizer = processor.tokenizer  # wrapped anew: saved by itself it would ask for its image processor
        processor = PreTrainedTokenizerFast(
            tokenizer_object=own_tokenizer.backend_tokenizer,
            eos_token=own_tokenizer.eos_token,
            pad_token=own_tokenizer.pad_token,
            chat_template=own_tokenizer.chat_template or processor.chat_template,
            model_max_length=2048,
        )
        model: Any = LlamaModel(LlamaConfig(**text, tie_word_embeddings=True))
    else:
        own = Qwen2VLConfig.from_pretrained(BACKBONE)
        shape = own.text_config.to_dict()
        own = Qwen2VLConfig(
            text_config={**shape, **text, "num_attention_heads": shape["num_attention_heads"]},
            vision_config={**own.vision_config.to_dict(), "hidden_size": config.hidden_size},
            tie_word_embeddings=True,
            **{key: getattr(own, key) for key in own.to_dict() if key.endswith("_token_id") and getattr(own, key)},
        )
        model = Qwen2VLModel(own)
    return build_model(model, processor=processor, device="cpu").train()


def batch(config: BenchmarkConfig, model: SentenceTransformer, family: str) -> list[dict[str, Any]]:
    """The columns: pictures of words (or several words, for a text-only backbone) and targets of some words."""
    images, texts = pairs.captions("train", config.batch_size, seed=0)
    words = [text.split()[-1] for text in texts]
    long = [" ".join((words * 2)[i : i + config.target_words]) for i in range(len(words))]
    queries = [f"{text} {text[::-1]} {text}" for text in texts] if family == "llama" else images
    return [model.preprocess(queries), model.preprocess(long)]


def naive_step(model: SentenceTransformer, loss: BTokLoss) -> Callable[[list[dict[str, Any]]], Tensor]:
    """Ranking by one call per column, generation by another call with logits for every position."""
    ranking = MultipleNegativesRankingLoss(model, scale=50.0)

    def joined(features: dict[str, Any], targets: list[Tensor]) -> tuple[dict[str, Any], Tensor]:
        rows = [row[mask.bool()] for row, mask in zip(features["input_ids"], features["attention_mask"], strict=True)]
        whole = [torch.cat([row, target]) for row, target in zip(rows, targets, strict=True)]
        inputs = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        labels = torch.full_like(inputs, -100)
        for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
            labels[number, len(row) : len(row) + len(target)] = target
        lengths = torch.tensor([len(row) for row in whole])
        mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
        types = (inputs == model[0].config.image_token_id).int() if "mm_token_type_ids" in features else None
        extra = {} if types is None else {"mm_token_type_ids": types}
        return {**features, "input_ids": inputs, "attention_mask": mask, **extra}, labels

    def step(columns: list[dict[str, Any]]) -> Tensor:
        total = ranking([dict(column) for column in columns], None)
        _, targets = loss.targets(columns)
        for features, target in zip(columns, targets, strict=True):
            if target is None:
                continue
            inputs, labels = joined(features, target)
            states = model[0](inputs)["token_embeddings"]
            logits = F.linear(states, model[0].model.get_input_embeddings().weight)
            total = total + F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return total

    return step


def run_worker(config: BenchmarkConfig, family: str, way: str) -> dict[str, Any]:
    """Time of each step in seconds, and the peak in MiB above what the process held before."""
    torch.set_num_threads(2)
    model = backbone(config, family)
    columns = batch(config, model, family)
    plain = BTokLoss(model)
    steps: dict[str, Callable[[list[dict[str, Any]]], Tensor]] = {
        "mnrl": lambda batch: BTokLoss.forward(ranking, batch).sum(),
        "btok": lambda batch: plain(batch).sum(),
        "kv": lambda batch: kv(batch).sum(),
        "cached": lambda batch: cached(batch).sum(),
        "naive": naive_step(model, plain),
    }
    ranking = BTokLoss(model, condensation_weight=0.0)
    kv = BTokLoss(model, route="kv")
    cached = CachedBTokLoss(model, mini_batch_size=config.mini_batch_size)
    for parameter in model.parameters():  # gradients exist before the peak is taken, as in training
        parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for number in range(config.steps + 1):
        started = time.perf_counter()
        steps[way]([dict(column) for column in columns]).backward()
        if number:
            seconds.append(time.perf_counter() - started)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    tokens = [sum(map(len, target)) for target in plain.targets(columns)[1] if target]
    return {
        "seconds": seconds,
        "peak": peak,
        "tokens": sum(int(c["attention_mask"].sum()) for c in columns),
        "targets": sum(tokens),
    }


def measure(config: BenchmarkConfig, family: str) -> list[dict[str, dict[str, Any]]]:
    """One dict of results by way for each round."""
    rounds = []
    for number in tqdm(range(config.rounds), desc=family):
        order = [*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]]  # no way is always the first
        results = {}
        for way in order:
            options = [f"--{key}={value}" for key, value in asdict(config).items() if key != "worker"]
            command = [sys.executable, "-m", "recipes.benchmark", *options, f"--worker={family}:{way}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{family}, {way} failed:\n{done.stderr}")
            results[way] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(results)
    return rounds


def table(rounds: list[dict[str, dict[str, Any]]], config: BenchmarkConfig, family: str) -> str:
    """Markdown: ratios to `mnrl` and to `naive`, median over rounds with their range."""
    first = rounds[0]["btok"]
    lines = [
        f"{family}: {config.batch_size} pairs, {first['tokens']} input tokens, {first['targets']} target tokens, "
        f"vocabulary {config.vocab_size:,}, width {config.hidden_size}; {config.rounds} paired rounds of "
        f"{config.steps} steps.",
        "",
        "| way | time / mnrl | time / naive | memory / naive | s per step | MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]

    def ratio(way: str, other: str, of: Callable[[dict[str, Any]], float]) -> str:
        values = [of(results[way]) / of(results[other]) for results in rounds]
        return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    for way in WAYS:
        seconds = np.median([np.median(results[way]["seconds"]) for results in rounds])
        peak = np.median([results[way]["peak"] for results in rounds])
        cells = [
            ratio(way, "mnrl", lambda result: float(np.median(result["seconds"]))),
            ratio(way, "naive", lambda result: float(np.median(result["seconds"]))),
            ratio(way, "naive", lambda result: result["peak"]),
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {seconds:.2f} | {peak:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all rounds and write the table, or one worker."""
    (config,) = HfArgumentParser(BenchmarkConfig).parse_args_into_dataclasses()
    if config.worker:
        print(json.dumps(run_worker(config, *config.worker.split(":"))))
        return
    text = "\n".join(table(measure(config, family), config, family) for family in config.backbones.split(","))
    Path(config.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
