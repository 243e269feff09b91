"""What a training says about its data: in the model card, and in a list of the rows it skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import constants
from sentence_transformers import SentenceTransformer

from evaluation import markdown
from recipes.data.training_pairs import Source


def describe_data(model: SentenceTransformer, sources: Sequence[Source]) -> None:
    """Tell the model card what it would otherwise ask the hub for, guess, or decode thousands of rows for."""
    card = model.model_card_data
    card.local_files_only = constants.HF_HUB_OFFLINE
    card.ir_model = True
    card.train_datasets = [{"name": s.name, **({"id": s.hub_id} if s.hub_id else {})} for s in sources]
    rows = [row for s in sources for row in s.pairs.select(range(min(2, len(s.pairs))))]
    texts = list(dict.fromkeys(side["text"].strip() for row in rows for side in row.values() if side["text"].strip()))
    card.widget = [{"source_sentence": texts[0], "sentences": texts[1:4]}] if texts else []


def write_card(path: Path, sources: Sequence[Source], held_out: Sequence[Source], target: str = "") -> None:
    """Add the data to the saved model card, which has settings and scores already.

    `target` is the side that was generated, where it was not each source's own.
    """
    validation = {source.name: len(source.pairs) for source in held_out}
    rows = []
    for source in sources:
        counts = (source.num_rows, len(source.broken), validation.get(source.name, 0))
        rows.append([source.name, *map(str, counts), str(source.weight), target or source.target])
    head = ["source", "rows", "skipped", "validation", "weight", "generated side"]
    with open(path / "README.md", "a", encoding="utf-8") as card:
        card.write(f"\n## Data of this training\n\n{markdown.table(head, rows, numbers=True)}\n")


def write_skipped(path: Path, sources: Sequence[Source]) -> None:
    """Every skipped row as a line of JSON: source, row of its table, reason."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(asdict(entry)) for source in sources for entry in source.broken]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
