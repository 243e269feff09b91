"""The quickstart: from the shipped backbone to a searchable BTok model, offline, in minutes on two CPU cores.

    python -m recipes.quickstart

1. Trains the backbone with `BTokLoss` and, with the same data, steps and seeds, with last-token pooling; scores both
   on held-out words and prints the comparison.
2. Saves `btok-quickstart/`, loads it with plain sentence-transformers in a process that can't import `st_btok`,
   checks that the embeddings are equal, and draws a search in both directions (`search.png`) and the loss curves
   (`loss.png`).
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib import pyplot as plt
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tqdm.auto import tqdm
from transformers import HfArgumentParser, TrainerCallback

from recipes.toy import pairs, scenes
from st_btok import BTokCallback, BTokLoss, build_model

# Runs in a fresh process in another folder: the saved model must need nothing but sentence-transformers.
PLAIN = """
import sys, json
sys.modules["st_btok"] = None  # makes any import of it fail
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print("EMBEDDINGS " + json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))
"""


@dataclass
class QuickstartConfig:
    """Settings of the quickstart; the defaults are what `make quickstart` runs."""

    backbone: str = str(Path(__file__).parent / "backbone")
    output: str = "btok-quickstart"
    seeds: int = 2
    steps: int = 40
    batch_size: int = 64
    learning_rate: float = 5e-4
    condensation_weight: float = 0.2
    condensation_steps: int | None = None
    num_btoks: int = 4
    split: str = "test"
    max_candidates: int | None = None


@dataclass(frozen=True)
class Run:
    """One trained model with its scores (task -> measure -> per cent) and the Trainer's log."""

    model: SentenceTransformer
    scores: dict[str, dict[str, float]]
    log: list[dict[str, float]]


def last_token_model(backbone: str) -> SentenceTransformer:
    """The usual pooling on the same backbone: the state of the last ordinary token."""
    transformer = Transformer(backbone, model_kwargs={"dtype": torch.float32})
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


def train(
    config: QuickstartConfig,
    method: str,
    seed: int,
    evaluators: dict,
    callbacks: Callable[[SentenceTransformer], list[TrainerCallback]] = lambda model: [],
) -> Run:
    """Train one method (`"BToks"` or `"last token"`) with one seed and score it."""
    torch.manual_seed(seed)
    if method == "BToks":
        model = build_model(config.backbone, config.num_btoks, model_kwargs={"dtype": torch.float32}, device="cpu")
        loss: torch.nn.Module = BTokLoss(
            model, condensation_weight=config.condensation_weight, condensation_steps=config.condensation_steps
        )
    else:
        model = last_token_model(config.backbone)
        loss = MultipleNegativesRankingLoss(model, scale=50.0)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=config.batch_size,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, config.steps // 2),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
    )
    data = pairs.train_dataset(config.steps * config.batch_size // 2, seed)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[BTokCallback(), *callbacks(model)]
    )
    trainer.train()
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    bar = tqdm(evaluators.items(), desc="scoring", leave=False)
    return Run(model, {name: pairs.scores(evaluator, model) for name, evaluator in bar}, trainer.state.log_history)


def comparison(runs: dict[str, list[Run]], candidates: int) -> str:
    """Markdown table: mean over seeds and half the range, per task and measure, in per cent."""
    measures = ("hit@1", "hit@10", "MRR")
    lines = ["| held-out task | pooling | " + " | ".join(measures) + " |", "|---|---|" + "---:|" * len(measures)]
    for task in next(iter(runs.values()))[0].scores:
        for method, seeds in runs.items():
            cells = []
            for measure in measures:
                values = [run.scores[task][measure] for run in seeds]
                cells.append(f"{np.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}")
            lines.append(f"| {task} | {method} | " + " | ".join(cells) + " |")
    ranks = np.arange(1, candidates + 1)
    chance = (100 / candidates, 100 * min(1, 10 / candidates), 100 * np.mean(1 / ranks))
    lines.append("| any | chance | " + " | ".join(f"{value:.1f}" for value in chance) + " |")
    return "\n".join(lines)


def plain_embeddings(path: Path, texts: list[str]) -> np.ndarray:
    """Embeddings from a fresh process with sentence-transformers alone; fails if that process does."""
    command = [sys.executable, "-c", PLAIN, str(path.resolve()), json.dumps(texts)]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"plain sentence-transformers could not load {path}:\n{result.stderr}")
    line = next(line for line in result.stdout.splitlines() if line.startswith("EMBEDDINGS "))
    return np.array(json.loads(line.removeprefix("EMBEDDINGS ")))


def draw_search(model: SentenceTransformer, images: list[Image.Image], texts: list[str], path: Path) -> None:
    """Four text queries with their top five images, four image queries with their top five texts."""
    image_vectors, text_vectors = model.encode(images), model.encode(texts)
    similarity = image_vectors @ text_vectors.T
    figure, axes = plt.subplots(8, 6, figsize=(13, 7.5), layout="constrained")
    right, wrong = "#1a7f37", "#777777"
    for row in range(4):
        query = row * 17
        axes[row, 0].text(0.5, 0.5, f"“{texts[query]}”", ha="center", va="center", fontsize=13)
        for column, index in enumerate(np.argsort(-similarity[:, query])[:5], start=1):
            axes[row, column].imshow(images[index])
            hit = index == query
            score = similarity[index, query]
            axes[row, column].set_title(
                f"{'✓ ' if hit else ''}{score:.2f}", color=right if hit else wrong, fontsize=10
            )
        query += 8
        axes[row + 4, 0].imshow(images[query])
        for column, index in enumerate(np.argsort(-similarity[query])[:5], start=1):
            hit = index == query
            label = f"{'✓ ' if hit else ''}{texts[index]}\n{similarity[query, index]:.2f}"
            axes[row + 4, column].text(
                0.5, 0.5, label, ha="center", va="center", fontsize=12, color=right if hit else wrong
            )
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle("query (left) and its five nearest among held-out words; ✓ marks the right one")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_losses(runs: dict[str, list[Run]], path: Path) -> None:
    """Ranking part of both methods and the condensation part, for each seed."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for color, (method, seeds) in zip(("C0", "C1"), runs.items(), strict=True):
        for number, run in enumerate(seeds):
            label = method if number == 0 else None
            rows = [entry for entry in run.log if "ranking" in entry or ("loss" in entry and method != "BToks")]
            steps = [entry["step"] for entry in rows]
            axes.plot(steps, [entry.get("ranking", entry.get("loss")) for entry in rows], color=color, label=label)
            if method == "BToks":
                condensation = [entry["condensation_nll"] for entry in rows]
                axes.plot(steps, condensation, ":", color=color, label=label and "BToks, condensation")
    axes.set(xlabel="step", ylabel="ranking loss (dotted: nats per generated byte)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the whole quickstart."""
    (config,) = HfArgumentParser(QuickstartConfig).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    output = Path(config.output)
    images, texts = pairs.captions(config.split, config.max_candidates or len(scenes.words(config.split)), seed=7)
    print(f"1. Train on pairs from {len(scenes.words('train'))} words; score on {len(texts)} others.")
    evaluators = pairs.evaluators(config.split, config.max_candidates)
    runs: dict[str, list[Run]] = {"last token": [], "BToks": []}
    for seed in range(config.seeds):
        for method, done in runs.items():
            print(f"   {method}, seed {seed}, {config.steps} steps of {config.batch_size} pairs:", flush=True)
            done.append(train(config, method, seed, evaluators))
    table = comparison(runs, len(texts))
    print(
        f"\nHeld-out words, {len(texts)} candidates, mean of {config.seeds} seeds ± half the range, in %:\n{table}\n"
    )
    print(f"2. Save {output}/ and load it with plain sentence-transformers, in a process without st_btok.")
    model = runs["BToks"][0].model
    # sentence-transformers 6.2 takes pictures for texts where a column holds dicts, and then writes no model card
    model.model_card_data.widget = []
    model.save_pretrained(str(output))
    (output / "comparison.md").write_text(table + "\n")
    difference = np.abs(plain_embeddings(output, texts[:50]) - model.encode(texts[:50])).max()
    print(f"   Largest difference between the two processes' embeddings: {difference:.1e}")
    if difference > 1e-5:
        raise RuntimeError("the reloaded model must give the same embeddings")
    draw_search(model, images, texts, output / "search.png")
    draw_losses(runs, output / "loss.png")
    print(f"   Pictures: {output}/search.png (search in both directions), {output}/loss.png")
    print(f"Done in {(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
