"""Hard negatives mined from a source's own positives, with sentence-transformers' `mine_hard_negatives`.

That function compares and removes duplicates by value, which needs hashable inputs, so it is given a key for each side
(content digest and text) and a model that embeds what the key stands for. All its rules then hold for images, videos
and image + text as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, Features
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
from tqdm.auto import tqdm

from recipes.data.training_pairs import Source, content_key

logger = logging.getLogger(__name__)


class _KeyedModel:
    """The part of a SentenceTransformer that `mine_hard_negatives` uses, over keys instead of inputs."""

    def __init__(self, model: SentenceTransformer, source: Source, places: dict[str, tuple[int, str]]) -> None:
        self.model, self.source, self.places = model, source, places
        self.device, self.similarity = model.device, model.similarity
        self.similarity_pairwise = model.similarity_pairwise

    def _encode(self, keys: Sequence[str], batch_size: int, desc: str, encode: Callable[..., Any]) -> np.ndarray:
        parts = []
        for start in tqdm(range(0, len(keys), 4 * batch_size), desc=desc):
            inputs = self.source.read_all([self.places[key] for key in keys[start : start + 4 * batch_size]])
            parts.append(encode(inputs, batch_size=batch_size, normalize_embeddings=True))
        return np.concatenate(parts)

    def encode_query(self, keys: Sequence[str], batch_size: int, **options: Any) -> np.ndarray:
        return self._encode(keys, batch_size, "queries", self.model.encode_query)

    def encode_document(self, keys: Sequence[str], batch_size: int, **options: Any) -> np.ndarray:
        return self._encode(keys, batch_size, "positives", self.model.encode_document)


def with_mined_negatives(
    source: Source,
    model: SentenceTransformer,
    num_negatives: int,
    *,
    relative_margin: float = 0.05,
    batch_size: int = 32,
) -> Source:
    """Add columns `negative_1` ... `negative_n` with the nearest positives of other queries.

    Args:
        source: The training part of a source, so that nothing held out becomes a negative.
        model: The embedder that judges what is near: the better it is, the better the negatives.
        num_negatives: n, at least 1.
        relative_margin: A candidate that scores above (1 - margin) times the positive is taken for a second right
            answer and skipped. Default 0.05 (NV-Retriever, arXiv 2407.15831).
        batch_size: Inputs per forward pass.

    Returns:
        The source with its own negatives replaced; pairs for which fewer than n were found are left out.

    Raises:
        ValueError: No pair has n negatives (a label set, or too few rows).
    """
    pairs = source.pairs.select_columns(["query", "positive"])
    places: dict[str, tuple[int, str]] = {}
    keys: dict[str, list[str]] = {"query": [], "positive": []}
    for number, record in enumerate(pairs):
        for side, found in keys.items():
            key = f"{side} {content_key(record[side])}"
            places.setdefault(key, (number, side))
            found.append(key)
    mined = mine_hard_negatives(
        Dataset.from_dict(keys),
        _KeyedModel(model, source, places),  # type: ignore[arg-type]
        num_negatives=num_negatives,
        relative_margin=relative_margin,
        output_format="n-tuple",
        batch_size=batch_size,
        verbose=False,
    )
    lost = len(pairs) - len(mined)
    if lost:
        logger.warning(
            "%s: %d of %d pairs are left out, because fewer than %d of the nearest other positives (there are %d) "
            "score below %.2f times their own positive; nearer ones may be right answers too.",
            source.name,
            lost,
            len(pairs),
            num_negatives,
            len(set(keys["positive"])) - 1,
            1 - relative_margin,
        )
    if not len(mined):
        raise ValueError(
            f"{source.name}: no pair has {num_negatives} negatives below the margin among its "
            f"{len(set(keys['positive']))} positives. Mine fewer, or leave this source without."
        )
    first = {(q, p): number for number, (q, p) in reversed(list(enumerate(zip(*keys.values(), strict=True))))}
    rows = [first[record["query"], record["positive"]] for record in mined]
    columns = {"query": pairs["query"], "positive": pairs["positive"]}
    chosen = {side: [values[row] for row in rows] for side, values in columns.items()}
    for number in range(1, num_negatives + 1):
        chosen[f"negative_{number}"] = [pairs[places[record[f"negative_{number}"]][0]]["positive"] for record in mined]
    features = Features(dict.fromkeys(chosen, pairs.features["positive"]))
    return replace(source, pairs=Dataset.from_dict(chosen, features=features))
