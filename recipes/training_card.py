"""What the model card of a training says about its data, and the list of skipped rows beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from sentence_transformers import SentenceTransformer

from recipes.training_pairs import Source


def describe_data(model: SentenceTransformer, sources: Sequence[Source]) -> None:
    """Tell the model card what it would otherwise ask the hub for, guess, or decode thousands of rows for."""
    card = model.model_card_data
    card.local_files_only = constants.HF_HUB_OFFLINE
    card.ir_model = True
    card.train_datasets = [{"name": s.name, **({"id": s.hub_id} if s.hub_id else {})} for s in sources]
    rows = [row for s in sources for row in s.pairs.select(range(min(2, len(s.pairs))))]
    texts = list(dict.fromkeys(side["text"].strip() for row in rows for side in row.values() if side["text"].strip()))
    card.widget = [{"source_sentence": texts[0], "sentences": texts[1:4]}] if texts else []


def write_card(path: Path, settings: Mapping[str, Any], sources: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Add data and settings to the saved model card, and write `skipped_rows.jsonl`.

    Args:
        path: Folder of the saved model.
        settings: Settings of the recipe; those of the Trainer and the scores are in the card already.
        sources: All sources as they were read.
        held_out: Their validation parts.
    """
    validation = {source.name: len(source.pairs) for source in held_out}
    lines = ["", "## Data of this training", ""]
    lines += ["| source | rows | skipped | validation | weight | generated side |", "|---|---:|---:|---:|---:|---|"]
    for source in sources:
        side = settings["target"] or source.target
        cells = (source.name, source.num_rows, len(source.broken), validation.get(source.name, 0), source.weight, side)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Settings of this training", "", "```json", json.dumps(dict(settings), indent=2), "```", ""]
    with open(path / "README.md", "a", encoding="utf-8") as card:
        card.write("\n".join(lines))
    rows = [json.dumps(asdict(entry)) for source in sources for entry in source.broken]
    (path / "skipped_rows.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
