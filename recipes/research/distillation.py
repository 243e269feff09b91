"""The distillation of `distill_to_last_token.py`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, WordWeights
from tqdm.auto import trange

from recipes.data.corpus import as_input
from recipes.data.tables import read_table
from st_btok import rgb_image

NEIGHBOURS = 10


@dataclass(frozen=True)
class Loss:
    """What the copy loses on held-out rows: mean cosine to MODEL's vectors, and the kept share of the ten nearest."""

    cosine: float
    kept: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}, {self.kept:.1%} of the {NEIGHBOURS} nearest kept"


def read_rows(path: Path) -> list[Any]:
    """Rows of a table as `encode` takes them, in the order of their keys; paths of images are relative to the file.

    Rows are dicts, as `encode` reads a text that names a picture as that picture.
    """
    rows: list[Any] = []
    for number, record in read_table(path):
        try:
            found = as_input(record, path.parent)
            row = {key: rgb_image(found[key]) if key == "image" else found[key] for key in found if key != "video"}
        except ValueError as error:
            raise ValueError(f"row {number} of {path} can't be read: {error}. Repair it, or leave it out.") from error
        if not row:
            raise ValueError(f"row {number} of {path} must have text, image or both, it has a video. Leave it out.")
        rows.append(row)
    return rows


def with_last_readout(model: SentenceTransformer) -> SentenceTransformer:
    """The same transformer, read at its last BTok; it shares its weights with `model`."""
    if not any(isinstance(module, WordWeights) for module in model):
        raise ValueError("MODEL must average its BToks (readout='mean'); this one needs no conversion.")
    config: Any = model[0].model.config
    if hasattr(config, "io_processor_plugin"):
        del config.io_processor_plugin  # engines may have this one
    pooling = Pooling(model[0].get_embedding_dimension(), "lasttoken")
    modules = [model[0], pooling, Normalize()]
    return SentenceTransformer(
        modules=modules,
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        truncate_dim=model.truncate_dim,
        device=str(model.device),
    )


def _vectors(model: SentenceTransformer, rows: list[Any]) -> np.ndarray:
    """(N, D) unit vectors, whole ones whatever the model cuts them to."""
    with model.truncate_embeddings(None):
        return model.encode(rows)


def compare(found: np.ndarray, wanted: np.ndarray, held_out: np.ndarray) -> Loss:
    """Score vectors of all rows against MODEL's on the held-out ones."""
    cosine = (found[held_out] * wanted[held_out]).sum(1).mean()
    nearest = []
    for vectors in (found, wanted):
        similarity = vectors[held_out] @ vectors.T
        similarity[np.arange(len(held_out)), held_out] = -np.inf  # itself
        nearest.append(np.argsort(-similarity)[:, :NEIGHBOURS])
    kept = [len(set(mine) & set(theirs)) / NEIGHBOURS for mine, theirs in zip(*nearest, strict=True)]
    return Loss(float(cosine), float(np.mean(kept)))


def distil(
    model: SentenceTransformer, rows: list[Any], steps: int, batch_size: int, learning_rate: float
) -> tuple[SentenceTransformer, Loss, Loss]:
    """Train the copy, which changes `model` too; returns the copy, and its loss of quality before and after."""
    if len(rows) < 3 * NEIGHBOURS:
        raise ValueError(f"at least {3 * NEIGHBOURS} rows are needed, got {len(rows)}.")
    wanted = _vectors(model, rows)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(rows))
    held_out, used = order[: max(NEIGHBOURS, len(rows) // 10)], order[max(NEIGHBOURS, len(rows) // 10) :]
    student = with_last_readout(model)
    before = compare(_vectors(student, rows), wanted, held_out)
    prompt = student.prompts.get(student.default_prompt_name or "")  # as `encode` does
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    student.train()
    for _ in (bar := trange(steps, desc="distilling")):
        chosen = rng.choice(used, min(batch_size, len(used)), replace=False)
        features = student.preprocess([rows[index] for index in chosen], prompt=prompt)
        features = {k: v.to(student.device) if torch.is_tensor(v) else v for k, v in features.items()}
        targets = torch.from_numpy(wanted[chosen]).to(student.device)
        loss = 1 - (student(features)["sentence_embedding"] * targets).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    student.eval()
    return student, before, compare(_vectors(student, rows), wanted, held_out)


def main(options: argparse.Namespace) -> None:
    """Distil, save, and print the loss of quality before and after."""
    rows = read_rows(options.data)
    model = SentenceTransformer(options.model, model_kwargs={"dtype": "float32"})
    student, before, after = distil(model, rows, options.steps, options.batch_size, options.learning_rate)
    student.save_pretrained(options.out)
    print(f"held-out rows, the last state as it is: {before}\nheld-out rows, distilled:              {after}")
