"""What is made of the model that sees (`seeing.py`) and measured on it: gates, ceiling, an embedder, a figure."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from transformers import (
    FastVlmForConditionalGeneration,
    LlavaProcessor,
)

from recipes.data.user_data import load_user_data
from recipes.research.seeing import SeeingConfig
from recipes.research.seeing_ceiling import ceiling, sides_of
from recipes.research.seeing_checkpoint import CONNECTOR, build_seeing
from recipes.research.seeing_connector import Reader, measure
from recipes.research.seeing_pictures import SOURCES, Captioned, held_out_pictures, read_split, write_pictures
from recipes.research.seeing_training import train
from recipes.research.variant import Variant, VariantSettings
from recipes.research.variants import build_variant, fit_variant, quiet
from st_btok import build_model, merge_adapters, rgb_image

QUERIES = ("a red bird", "a ship at sea", "something to eat", "a musical instrument", "vlorp qwzx")  # the last: none


def gates(folder: Path, cache: Path, connector: Path = CONNECTOR) -> str:
    """What the committed connector must show on held-out stamps, measured now.

    Args:
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
        connector: Folder of the connector and its record.

    Returns:
        A line for each gate: what was asked, what was found, and whether it holds.
    """
    path = build_seeing(connector=connector)
    model = FastVlmForConditionalGeneration.from_pretrained(path).eval()
    processor = LlavaProcessor.from_pretrained(path)
    held_out = read_split("stamps", "test", model, processor, folder, cache)
    record = json.loads((connector / "training.json").read_text(encoding="utf-8"))
    seen = np.array([int(value, 16) for value in record["hashes"]], np.uint64)
    near = int(held_out.near(Captioned(torch.zeros(0), [], seen)).sum())
    reader = Reader(model, processor.tokenizer, torch.float32)
    found = measure(model.model.multi_modal_projector, reader, held_out)
    gain = found["wrong"] - found["right"]
    number = len(held_out.captions)
    checks = [
        (f"nats a token saved by the right picture, {number} captions, at least 0.5", f"{gain:.2f}", gain >= 0.5),
        *(
            (f"MRR of untrained BToks {way} among {number}, at least 35", f"{found[way]:.1f}", found[way] >= 35)
            for way in ("to text", "to picture")
        ),
        (f"test pictures near one of the {len(seen)} that were trained on, none", str(near), near == 0),
    ]
    return "\n".join(f"{'passed' if passed else 'FAILED'}: {what}: {value}" for what, value, passed in checks)


def print_ceiling(folder: Path, cache: Path) -> None:
    """What two linear maps that are trained to search find on the gate's pictures.

    Args:
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
    """
    path = build_seeing()
    model = FastVlmForConditionalGeneration.from_pretrained(path).eval()
    processor = LlavaProcessor.from_pretrained(path)
    reader = Reader(model, processor.tokenizer, torch.float32)
    splits = [(SOURCES, "train"), (("stamps",), "validation"), (("stamps",), "test")]
    sides = [
        sides_of([read_split(name, split, model, processor, folder, cache) for name in names], reader)
        for names, split in splits
    ]
    to_text, to_picture = ceiling(*sides)
    number = len(sides[-1].topics)
    print(f"two linear maps trained to search: MRR to text {to_text:.1f}, to picture {to_picture:.1f} of {number}")


def make_embedder(to: Path, folder: Path, cache: Path, steps: int, bf16: bool = False, seed: int = 0) -> None:
    """Save the model with bottleneck tokens, trained on the training pictures with their captions if asked to.

    Args:
        to: Folder of the saved model.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
        steps: Steps of 16 pairs, with LoRA at 1e-3; 0: as the connector was trained.
        bf16: Whether the products of that training are in bfloat16.
        seed: Seed of order and dropout.
    """
    build = {"max_seq_length": 512}
    if not steps:
        build_model(build_seeing(), device="cpu", **build).save_pretrained(str(to))
        return
    roots = {name: write_pictures(name, folder, cache) for name in SOURCES}
    data = DatasetDict(
        {name: load_user_data([str(root / "train.jsonl")])[0].dataset() for name, root in roots.items()}
    )
    settings = VariantSettings(build_seeing(), steps, batch_size=16, learning_rate=1e-3, build=build, bf16=bf16)
    variant = Variant.parse("btok:condensation_weight=0")
    model, loss = build_variant(variant, settings, seed)
    fit_variant(model, loss, variant, settings, seed, data, "pictures and captions")
    merge_adapters(model).save_pretrained(str(to))


def draw_searches(model: SentenceTransformer, paths: Sequence[Path], queries: Sequence[str], to: Path) -> None:
    """The five nearest pictures of each query, with their similarities.

    Args:
        model: The embedder.
        paths: Pictures.
        queries: Texts.
        to: The PNG.
    """
    pictures = [rgb_image(path) for path in paths]
    scores = model.encode_query(list(queries)) @ model.encode_document(pictures, batch_size=32).T
    figure, axes = plt.subplots(
        len(queries), 6, figsize=(8.4, 1.45 * len(queries)), layout="constrained", squeeze=False
    )
    for row, (query, found) in enumerate(zip(queries, scores, strict=True)):
        axes[row, 0].text(0.02, 0.5, query, va="center", wrap=True, fontsize=11)
        for axis, number in zip(axes[row, 1:], np.argsort(-found), strict=False):
            axis.imshow(pictures[number])
            axis.set_title(f"{found[number]:.2f}", fontsize=9)
        for axis in axes[row]:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)


def write_held_out(to: Path, folder: Path, cache: Path) -> None:
    """Copy pictures that nothing was trained on; no name gives an answer away.

    Args:
        to: Folder of the copies.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
    """
    to.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(held_out_pictures(folder, cache)):
        shutil.copyfile(path, to / f"{number:03}.png")


def run_seeing(config: SeeingConfig) -> None:
    """Build the model and print its gates; or what else the flags ask for.

    Args:
        config: The flags.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    corpora, cache, connector = (Path(path) for path in (config.corpora, config.cache, config.output_dir))
    if config.train:
        train(config.train, corpora, cache, connector)
    if config.ceiling:
        print_ceiling(corpora, cache)
    elif config.embedder:
        write_embedder(config, Path(config.embedder), corpora, cache)
    else:
        print(gates(corpora, cache, connector))


def write_embedder(config: SeeingConfig, to: Path, corpora: Path, cache: Path) -> None:
    """Make the embedder, unless it is there; write held-out pictures and draw searches among them, where asked to.

    Args:
        config: The flags.
        to: Folder of the embedder.
        corpora: Where corpora are written.
        cache: Folder of unpacked packages.
    """
    quiet()
    if not (to / "modules.json").exists():
        make_embedder(to, corpora, cache, config.steps, config.bf16)
    if config.pictures:
        write_held_out(Path(config.pictures), corpora, cache)
    if config.figure:
        draw_searches(SentenceTransformer(str(to)), held_out_pictures(corpora, cache), QUERIES, Path(config.figure))
