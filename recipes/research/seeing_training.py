"""Train the connector of the model that sees (`seeing.py`), and write its record and curve."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt
import torch

from recipes.research.seeing_alignment import align
from recipes.research.seeing_checkpoint import CACHE, assemble
from recipes.research.seeing_connector import ClosedForm, Reader, class_pictures, fit_closed_form
from recipes.research.seeing_pictures import read_split
from recipes.research.smollm2 import smollm2_folder

SHARES = (0.45, 0.25, 0.2, 0.1)  # of stamps, clip art, emoji and classes in a batch


def train(steps: int, folder: Path, cache: Path, to: Path, seed: int = 0) -> None:
    """Train the connector from nothing and write it with its record and curve.

    Args:
        steps: Steps of the training; the closed form takes 400 of its own.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
        to: Folder of the connector.
        seed: Seed of everything.
    """
    start = time.process_time()
    model, processor = assemble(smollm2_folder(CACHE))
    read = partial(read_split, model=model, processor=processor, folder=folder, cache=cache)
    stamps = {split: read("stamps", split) for split in ("train", "validation", "test")}
    held_out = [stamps["validation"], stamps["test"]]
    trained = [stamps["train"], *(read(name, "train") for name in ("clipart", "emoji"))]
    counts = [len(source.captions) for source in trained]
    for others in held_out:
        trained = [source.without(others) for source in trained]
    features = torch.cat([source.features for source in trained])
    print(f"pictures: {counts}, without those near a held-out one {[len(s.captions) for s in trained]}", flush=True)
    reader = Reader(model, processor.tokenizer, torch.bfloat16)
    connector = model.model.multi_modal_projector.requires_grad_(True)
    captions = [caption for source in trained for caption in source.captions]
    errors = fit_closed_form(connector, ClosedForm(features, captions, reader), features, 400, seed)
    print(f"closed form: error {errors[-1]:.2f} of the variance, {time.process_time() - start:.0f} s", flush=True)
    sources = list(zip([*trained, class_pictures(features, seed)], SHARES, strict=True))
    log = align(connector, reader, sources, stamps["validation"], steps, to, seed)
    record = {
        "pictures": dict(zip(("stamps", "clipart", "emoji"), map(lambda s: len(s.captions), trained), strict=True)),
        "steps": steps,
        "seed": seed,
        "seconds": round(time.process_time() - start),
        "closed form": errors[::20],
        "training": log,
        "hashes": [f"{value:016x}" for source in trained for value in source.hashes],
    }
    (to / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    draw_curve(log, to / "training.png")


def draw_curve(log: Sequence[dict[str, float]], path: Path) -> None:
    """Nats and MRR on validation over the steps."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 5), layout="constrained", sharex=True)
    steps = [line["step"] for line in log]
    for name, label in (("right", "right picture"), ("wrong", "another picture")):
        above.plot(steps, [line[name] for line in log], label=label)
    for name, label in (("to text", "picture to caption"), ("to picture", "caption to picture")):
        below.plot(steps, [line[name] for line in log], label=label)
    above.set_ylabel("nats a token")
    below.set_ylabel("MRR in %, validation stamps")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)
