"""The quickstart's work: train on drawn words, compare, save, reload without st_btok, draw."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from sentence_transformers import SentenceTransformer

from recipes.data.searches import Search
from recipes.quickstart import QuickstartConfig
from recipes.research.significance import Run, draw, table
from recipes.research.variant import Variant, VariantSettings
from recipes.research.variants import quiet, train_variant
from recipes.toy import pairs, scenes

# Runs in a fresh process in another folder: the saved model must need nothing but sentence-transformers.
PLAIN = """
import sys, json
sys.modules["st_btok"] = None  # makes any import of it fail
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print("EMBEDDINGS " + json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))
"""


# The BToks are initialised the same in every run.
VARIANTS = {
    "last token": Variant("lasttoken"),
    "BToks": Variant("btok", {"seed": 0}),
    "BToks, no condensation loss": Variant("btok", {"seed": 0, "condensation_weight": 0}),
}


def settings_of(config: QuickstartConfig) -> VariantSettings:
    """What both models share."""
    return VariantSettings(
        config.backbone,
        config.steps,
        config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=min(10, config.steps // 2),
        tuning="full",
        build={"model_kwargs": {"dtype": torch.float32}},
        device="cpu",
    )


def train_all(config: QuickstartConfig, searches: Sequence[Search]) -> tuple[SentenceTransformer, list[Run]]:
    """Train both poolings with every seed; the BTok model of the first seed, and all runs."""
    runs, kept = [], None
    for seed in range(config.seeds):
        data = pairs.train_dataset(config.steps * config.batch_size // 2, seed)
        for name in config.variants:
            title = f"   {name}, seed {seed}"
            model, run = train_variant(name, VARIANTS[name], settings_of(config), seed, data, searches, title)
            runs.append(run)
            print(f"{title}: {run.summary()}", flush=True)
            if kept is None and VARIANTS[name].pooling == "btok":
                kept = model
    return kept, runs


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


def main(config: QuickstartConfig) -> None:
    """Run the whole quickstart."""
    quiet()
    started = time.perf_counter()
    output = Path(config.output_dir)
    size = config.max_candidates or len(scenes.words(config.split))
    searches = pairs.searches(config.split, size)
    print(f"1. Train on pairs from {len(scenes.words('train'))} words; score on {size} others.", flush=True)
    model, runs = train_all(config, searches)
    text = table(runs, config.variants[0], {search.name: len(search.documents) for search in searches})
    print(f"\n{size} held-out words, captions among {2 * size} candidates (each word in two inks):\n\n{text}\n")
    print(f"2. Save {output}/ and load it with plain sentence-transformers, in a process without st_btok.")
    # sentence-transformers 6.2 takes pictures for texts where a column holds dicts, and then writes no model card
    model.model_card_data.widget = []
    model.save_pretrained(str(output))
    (output / "comparison.md").write_text(text + "\n")
    images, texts = pairs.captions(config.split, size, seed=7)
    difference = np.abs(plain_embeddings(output, texts[:50]) - model.encode(texts[:50])).max()
    print(f"   Largest difference between the two processes' embeddings: {difference:.1e}")
    if difference > 1e-5:
        raise RuntimeError("the reloaded model must give the same embeddings")
    draw_search(model, images, texts, output / "search.png")
    draw(runs, output / "comparison.png")
    print(f"   Pictures: {output}/search.png (search in both directions), {output}/comparison.png")
    print(f"Done in {(time.perf_counter() - started) / 60:.1f} minutes.")
