"""What pictures and captions of `seeing.py` have in common, as far as two linear maps can find it.

    python -m recipes.research.seeing --ceiling

The gate on search asks the same of a decoder that was never trained to search. Here both sides are trained to, on the
same pictures: one linear map of the tower's mean feature, one of the decoder's states behind a caption's topic, by the
symmetric InfoNCE loss. Width, dropout and step are chosen on validation, the score is that of the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.research.seeing_connector import Reader, reciprocal_ranks
from recipes.research.seeing_pictures import Captioned, topic

WIDTHS, DROPOUTS = (64, 256, 576), (0.2, 0.5)
STEPS, BATCH_SIZE, TEMPERATURE = 400, 256, 0.07


@dataclass(frozen=True)
class Sides:
    """Pictures (N, 1280) and the topics of their captions (N, D)."""

    pictures: Tensor
    topics: Tensor


@torch.no_grad()
def sides_of(sources: Sequence[Captioned], reader: Reader) -> Sides:
    """Both sides of some pictures, as tower and decoder give them."""
    captions = [caption for source in sources for caption in source.captions]
    topics = [" ".join(topic(caption).split()[:10]) for caption in captions]
    pictures = torch.cat([source.features.float().mean(1) for source in sources])
    return Sides(pictures, reader.embed(reader.words(topics)))


def ceiling(train: Sides, validation: Sides, test: Sides, seed: int = 0) -> tuple[float, float]:
    """MRR in % on the test split, to text and to picture, of the maps that are best on validation.

    Args:
        train: What the maps are fitted to.
        validation: What chooses width, dropout and step.
        test: What is scored.
        seed: Seed of weights and batches.

    Returns:
        Two numbers.
    """
    torch.manual_seed(seed)
    best, found = -1.0, (0.0, 0.0)
    scaled = [Sides(*map(_standardised, _values(split), _values(train))) for split in (train, validation, test)]
    for width in WIDTHS:
        for dropout in DROPOUTS:
            maps = nn.ModuleList([nn.Linear(side.shape[1], width) for side in _values(train)])
            optimizer = torch.optim.AdamW(maps.parameters(), 1e-3, weight_decay=0.5)
            for step in range(STEPS):
                rows = torch.randint(len(train.pictures), (BATCH_SIZE,))
                scores = _scores(maps, Sides(*(F.dropout(side[rows], dropout) for side in _values(scaled[0]))))
                labels = torch.arange(BATCH_SIZE)
                loss = F.cross_entropy(scores / TEMPERATURE, labels) + F.cross_entropy(scores.T / TEMPERATURE, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step % 20 == 0:
                    score = sum(_both_ways(maps, scaled[1]))
                    if score > best:
                        best, found = score, _both_ways(maps, scaled[2])
    return found


def _values(sides: Sides) -> tuple[Tensor, Tensor]:
    return sides.pictures, sides.topics


def _standardised(side: Tensor, train: Tensor) -> Tensor:
    return (side - train.mean(0)) / (train.std(0) + 1e-3)


def _scores(maps: nn.ModuleList, sides: Sides) -> Tensor:
    """(N, N) cosines."""
    left, right = (F.normalize(own(side), dim=-1) for own, side in zip(maps, _values(sides), strict=True))
    return left @ right.T


@torch.no_grad()
def _both_ways(maps: nn.ModuleList, sides: Sides) -> tuple[float, float]:
    scores = _scores(maps, sides)
    return reciprocal_ranks(scores), reciprocal_ranks(scores.T)
