"""Step time and peak memory of the losses, as ratios of paired runs.

    python -m recipes.bench step

Ways to train on the same batch of (image or text, text) pairs with a small backbone that has a large vocabulary:

* `mnrl`: ranking alone, through the same BTok model;
* `explained`: ranking with the targets read as ordinary tokens behind the BToks, and one plain projection of the
  states that predict them, all logits at once: what the extra tokens cost without mask and chunks;
* `btok`; `frozen`: `btok` with a frozen vocabulary, as under LoRA;
* `cached mnrl`, `cached`: ranking alone and `CachedBTokLoss`, both by sentence-transformers' GradCache.

Each round runs every way once, each in a process of its own, so that peak memory is its own. Memory is what a step
adds to the process at its peak. A second table follows it over growing batches.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLModel,
)

from evaluation import markdown
from recipes.bench.paired import cpu_seconds, rounds_of, spread
from recipes.bench.settings import BACKBONE, BenchmarkConfig
from recipes.toy import pairs
from st_btok import BTokLoss, CachedBTokLoss, build_model

WAYS = ("mnrl", "explained", "btok", "frozen", "cached mnrl", "cached")
TIMED_AGAINST = ("mnrl", "explained", "cached mnrl")


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
    counts = [1 + i % (2 * config.target_words - 1) for i in range(len(words))]
    long = [" ".join((words * 2)[i : i + count]) for i, count in enumerate(counts)]
    queries = [f"{text} {text[::-1]} {text}" for text in texts] if family == "llama" else images
    return [model.preprocess(queries), model.preprocess(long)]


class OneWidth(BTokLoss):
    """Every column in one call, however different its rows are in length."""

    def split(self, column: Any) -> list[Any]:
        """In one part."""
        return [column]


def total(parts: dict[str, Tensor]) -> Tensor:
    """The loss, from the parts that a loss returns."""
    return torch.stack(list(parts.values())).sum()


def joined(
    model: SentenceTransformer, features: dict[str, Any], targets: list[Tensor]
) -> tuple[dict[str, Any], Tensor]:
    """`[input][BToks][target]` rows as ordinary inputs, and labels that are -100 outside of the targets."""
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


def explained_step(model: SentenceTransformer, loss: BTokLoss) -> Callable[[list[dict[str, Any]]], Tensor]:
    """One call per column with the targets as ordinary tokens, and one projection of the states that predict them."""
    ranking = MultipleNegativesRankingLoss(model, scale=50.0)

    def step(columns: list[dict[str, Any]]) -> Tensor:
        targets = loss.targets(columns)
        embeddings, total = [], torch.zeros(())
        for features, target in zip(columns, targets, strict=True):
            inputs, labels = (dict(features), None) if target is None else joined(model, features, target)
            output = model[0](inputs)
            if labels is not None:
                predicted = labels[:, 1:] != -100
                states = output["token_embeddings"][:, :-1][predicted]
                logits = F.linear(states, model[0].model.get_input_embeddings().weight)
                total = total + F.cross_entropy(logits, labels[:, 1:][predicted])
            for module in list(model)[1:]:
                output = module(output)
            embeddings.append(output["sentence_embedding"])
        return ranking.compute_loss_from_embeddings(embeddings, None) + total

    return step


def make_step(config: BenchmarkConfig, model: SentenceTransformer, way: str) -> Callable[[list[Any]], Tensor]:
    """What turns the columns into the loss, for one way."""
    if way == "explained":
        return explained_step(model, BTokLoss(model))
    if way == "cached mnrl":
        ranking = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=config.mini_batch_size)
        return lambda columns: ranking(columns, None)
    if way == "frozen":
        model[0].model.get_input_embeddings().requires_grad_(False)
    if way == "cached":
        loss: Any = CachedBTokLoss(model, mini_batch_size=config.mini_batch_size)
    else:
        loss = BTokLoss(model, condensation_weight=0.0 if way == "mnrl" else 0.2)
    return lambda columns: total(loss(columns))


def run_worker(config: BenchmarkConfig, family: str, way: str) -> dict[str, Any]:
    """CPU time of each step in seconds, and the peak in MiB above what the process held before."""
    torch.set_num_threads(1)
    model = backbone(config, family)
    targets_of = BTokLoss(model).targets  # first: features carry what a row generates once a loss is made
    step = make_step(config, model, way)
    columns = batch(config, model, family)
    for parameter in model.parameters():  # gradients exist before the peak is taken, as in training
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The first step warms up.
    one = partial(cpu_seconds, lambda: step([dict(column) for column in columns]).backward())
    seconds = [one() for _ in range(config.steps + 1)][1:]
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "seconds": seconds,
        "peak": peak,
        "tokens": sum(int(c["attention_mask"].sum()) for c in columns),
        "targets": sum(len(row) for target in targets_of(columns) if target for row in target),
    }


def run(config: BenchmarkConfig, family: str, way: str) -> dict[str, Any]:
    """`run_worker` in a process of its own."""
    options = [f"--{key}={value}" for key, value in asdict(config).items() if key != "worker"]
    command = [sys.executable, "-m", "recipes.bench", "step", *options, f"--worker={family}:{way}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{family}, {way} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rounds: list[dict[str, dict[str, Any]]], config: BenchmarkConfig, family: str) -> str:
    """Markdown: ratios to other ways, median over rounds with their range."""
    first = rounds[0]["btok"]
    title = (
        f"{family}: {config.batch_size} pairs, {first['tokens']} input tokens, {first['targets']} target tokens, "
        f"vocabulary {config.vocab_size:,}, width {config.hidden_size}; {config.rounds} paired rounds of "
        f"{config.steps} steps, CPU time of one thread."
    )
    head = ["way", *(f"time / {other}" for other in TIMED_AGAINST), "memory / explained", "s per step", "MiB"]
    rows = []

    def ratio(way: str, other: str, of: Callable[[dict[str, Any]], float]) -> str:
        return spread([of(results[way]) / of(results[other]) for results in rounds])

    for way in WAYS:
        cells = [ratio(way, other, lambda one: np.median(one["seconds"])) for other in TIMED_AGAINST]
        cells.append(ratio(way, "explained", lambda one: one["peak"]))
        seconds = np.median([np.median(results[way]["seconds"]) for results in rounds])
        peak = np.median([results[way]["peak"] for results in rounds])
        rows.append([way, *cells, f"{seconds:.2f}", f"{peak:,.0f}"])
    return f"{title}\n\n{markdown.table(head, rows, numbers=True)}\n"


def memory_table(config: BenchmarkConfig, family: str) -> str:
    """Markdown: the peak of `btok` and `cached` over growing batches."""
    sizes = [int(size) for size in config.batches.split(",")]
    title = f"{family}: MiB at the peak of a step, mini-batches of {config.mini_batch_size}."
    rows = []
    for way in ("btok", "cached"):
        peaks = [run(replace(config, batch_size=size, steps=1), family, way)["peak"] for size in sizes]
        rows.append([way, *(f"{peak:,.0f}" for peak in peaks)])
    return f"{title}\n\n{markdown.table(['way', *(f'{size} pairs' for size in sizes)], rows, numbers=True)}\n"


def main(config: BenchmarkConfig) -> None:
    """Run all rounds and write the tables, or one worker."""
    if config.worker:
        print(json.dumps(run_worker(config, *config.worker.split(":"))))
        return
    families = config.backbones.split(",")
    tables = []
    for family in families:
        ways = {way: partial(run, config, family, way) for way in WAYS}
        tables.append(table(rounds_of(ways, config.rounds), config, family))
    text = "\n".join([*tables, *(memory_table(config, family) for family in families)])
    Path(config.output).write_text(text)
    print(text)
