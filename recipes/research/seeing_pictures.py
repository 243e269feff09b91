"""Pictures with captions as the tower of `seeing.py` sees them, from packages; held-out ones apart."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.data.real import SAME_PICTURE, difference_hash, write_corpus
from recipes.research.seeing_checkpoint import SIDE, TOWER
from st_btok import rgb_image

SOURCES = ("stamps", "clipart", "emoji")  # of pictures with captions


@dataclass(frozen=True)
class Captioned:
    """Pictures with captions, as features of the tower.

    Args:
        features: (N, 49, 1280) float16.
        captions: N texts.
        hashes: (N,) uint64 difference hashes of the pictures.
    """

    features: Tensor
    captions: Sequence[str]
    hashes: np.ndarray

    def without(self, others: Captioned) -> Captioned:
        """Those whose pictures are not nearly the same as one of the others'."""
        kept = np.flatnonzero(~self.near(others))
        return Captioned(self.features[kept], [self.captions[row] for row in kept], self.hashes[kept])

    def near(self, others: Captioned) -> np.ndarray:
        """(N,) whether a picture is within the difference hash of one of the others'."""
        if not len(others.hashes):
            return np.zeros(len(self.hashes), bool)
        bits = np.bitwise_count(self.hashes[:, None] ^ others.hashes[None])
        return np.asarray(bits <= SAME_PICTURE).any(1)


@torch.no_grad()
def features_of(model: Any, processor: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """What the tower sees.

    Args:
        model: The model.
        processor: Its processor.
        pictures: N pictures.

    Returns:
        (N, 49, 1280) float16.
    """
    found = []
    for start in range(0, len(pictures), 32):
        pixels = processor.image_processor(pictures[start : start + 32], return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, return_dict=True).last_hidden_state  # (B, 1280, 7, 7)
        found.append(states.flatten(2).transpose(1, 2).half())
    return torch.cat(found)


def read_split(name: str, split: str, model: Any, processor: Any, folder: Path, cache: Path) -> Captioned:
    """One split of one corpus; the tower's features are kept beside it.

    Args:
        name: `stamps`, `clipart` or `emoji`.
        split: `train`, `validation` or `test`.
        model: The model.
        processor: Its processor.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.

    Returns:
        Its pictures.
    """
    root = write_pictures(name, folder, cache)
    rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    captions = [row["positive_text"] for row in rows]
    kept = root / f"{split}-{TOWER}-{SIDE}.safetensors"
    if not kept.exists():
        pictures = [rgb_image(root / row["query_image"]) for row in rows]
        hashes = torch.tensor([difference_hash(picture) - 2**63 for picture in pictures], dtype=torch.int64)
        save_file({"features": features_of(model, processor, pictures).contiguous(), "hashes": hashes}, kept)
    found = load_file(kept)
    hashes = (found["hashes"].numpy().astype(object) + 2**63).astype(np.uint64)
    return Captioned(found["features"], captions, hashes)


def topic(caption: str) -> str:
    """What a caption is about, as it follows " The topic is the": without article, keywords and full stop."""
    return re.sub(r"^(an?|the|some|two)\s+", "", caption.split(":")[0].strip().rstrip(".!?").lower())


def write_pictures(name: str, folder: Path, cache: Path) -> Path:
    """Write a corpus, unless it is there.

    Args:
        name: `stamps`, `clipart` or `emoji`.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.

    Returns:
        Its folder.
    """
    root = folder / name
    if not (root / "samples.png").exists():  # the last file that is written
        write_corpus(name, root, cache)
    return root


def held_out_pictures(folder: Path, cache: Path) -> list[Path]:
    """Pictures of stamps and clip art that nothing was trained on.

    Args:
        folder: Where corpora are written.
        cache: Folder of unpacked packages.

    Returns:
        Their paths.
    """
    found = []
    for name in ("stamps", "clipart"):
        root = write_pictures(name, folder, cache)
        for split in ("validation", "test"):
            lines = (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            found += [root / json.loads(line)["query_image"] for line in lines]
    return found
