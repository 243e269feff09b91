"""What must run in every set of dependency versions that `pyproject.toml` allows: the core, in under a minute.

    python -m tests.core_smoke

Builds on the shipped backbone, takes three Trainer steps on pictures and texts (plain, under GradCache, and with
LoRA), saves, loads in a process that can't import `st_btok`, and encodes there. Prints the versions first. A script
and not a pytest file, so that nothing but the package's own dependencies is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_btok import BTokLoss, CachedBTokLoss, btok_lora_config, build_model, save_trained

BACKBONE = Path(__file__).parent.parent / "recipes" / "backbone"
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "sentence-transformers",
    "peft",
    "accelerate",
    "datasets",
    "pillow",
)
WORDS = ("kitten", "bridge", "yellow", "window", "garden", "silver")
# Encodes with sentence-transformers alone: the import of st_btok is made to fail.
READER = """
import sys
sys.modules["st_btok"] = None
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
inputs = ["a red kitten", Image.open(sys.argv[2])]
np.save(sys.argv[3], SentenceTransformer(sys.argv[1], device="cpu").encode(inputs))
"""


def picture(seed: int) -> Image.Image:
    """Coloured blocks, different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(14, 0).repeat(14, 1))


def train(model: SentenceTransformer, loss: Any, folder: Path) -> list[float]:
    """Three optimizer steps of two pairs; the loss of each."""
    pairs = {"query": [picture(seed) for seed in range(len(WORDS))], "positive": list(WORDS)}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    table = Dataset.from_dict(pairs).cast_column("query", ImageColumn())
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=table, loss=loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if len(losses) != 3 or not np.isfinite(losses).all():
        raise SystemExit(f"three finite losses must be logged, got {trainer.state.log_history}")
    return losses


def reload(model: SentenceTransformer, folder: Path) -> float:
    """Largest difference between the model and its checkpoint as read in another process without `st_btok`."""
    page, found = folder / "page.png", folder / "found.npy"
    picture(99).save(page)
    subprocess.run([sys.executable, "-c", READER, str(folder / "model"), str(page), str(found)], check=True)
    expected = model.eval().encode(["a red kitten", Image.open(page)])
    difference = float(np.abs(np.load(found) - expected).max())
    if not difference < 1e-5:
        raise SystemExit(f"the reloaded model must embed as the one in memory, but differs by {difference:.2g}")
    return difference


def main() -> None:
    """All steps; exits with a message where one fails."""
    torch.set_num_threads(1)
    print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in PACKAGES), sep=", ", flush=True)
    for name, loss_class in (("plain", BTokLoss), ("GradCache", CachedBTokLoss), ("LoRA", BTokLoss)):
        model = build_model(BACKBONE, model_kwargs={"dtype": torch.float32}, device="cpu")
        if name == "LoRA":
            model.add_adapter(btok_lora_config(model, r=4))
        before = model.encode([WORDS[0]])
        with tempfile.TemporaryDirectory() as folder:
            options = {"mini_batch_size": 1} if loss_class is CachedBTokLoss else {}
            losses = train(model, loss_class(model, **options), Path(folder))
            moved = float(np.abs(model.eval().encode([WORDS[0]]) - before).max())
            if not moved > 1e-4:
                raise SystemExit(f"{name}: three steps must move the embeddings, but they moved by {moved:.2g}")
            report = save_trained(model, Path(folder) / "model")
            print(f"{name}: losses {losses}, reloaded within {reload(model, Path(folder)):.1g}; saved {report}")


if __name__ == "__main__":
    main()
