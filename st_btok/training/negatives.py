"""Which in-batch negatives count: false negatives are dropped without a guide model.

Their similarities become -inf before the softmax, through the `similarity_fct` of `MultipleNegativesRankingLoss`, so
this combines with every direction, partition and hardness mode of that loss.

Dropping negatives that score above the positive by a margin is what GISTEmbed does with a guide model
(arXiv 2402.16829) and NV-Retriever when it mines (arXiv 2407.15831). Here the trained model's own scores decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from st_btok.training.splitting import is_media, row_offsets

# The order in which MultipleNegativesRankingLoss computes its similarity matrices.
_ORDER = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def content_fingerprints(features: dict[str, Any], media_tokens: dict[str, int]) -> Tensor:
    """(B,) int64, equal for rows of equal text and media; for different ones with probability 2^-64."""
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    # Positions count from the first real token, so that padding changes nothing.
    content = (_weights(ids.shape[1], ids.device)[(mask.cumsum(1) - 1).clamp(min=0)] * (ids + 1) * mask).sum(1)
    for key, offsets in row_offsets(features, media_tokens).items():
        value = features[key]
        # What else has one entry for each row is no content: the model writes its states and embeddings there.
        if not value.is_floating_point() or (len(value) == len(ids) and not is_media(key)):
            continue
        for row in range(len(ids)):
            part = value[offsets[row] : offsets[row + 1]]
            if part.numel():
                bits = part.contiguous().float().view(torch.int32).flatten().long()
                content[row] += (bits * _weights(len(bits), bits.device)).sum()
    return content


def _weights(length: int, device: torch.device) -> Tensor:
    """Odd pseudo-random int64 numbers by position; sums of products with them wrap around, which is meant."""
    index = torch.arange(1, length + 1, device=device)
    mixed = index * -7046029254386353131  # 2^64 / golden ratio
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687  # splitmix64's second constant
    return mixed | 1


class FilteredSimilarity:
    """A `similarity_fct` whose dropped negatives are -inf.

    For anchor i, a candidate other than its own is dropped if the batch itself says that it is no negative: a document
    that is the positive of a query with the content of q_i (a duplicate of d_i, or the second answer of a query that
    stands in the batch twice), or a query whose positive has the content of d_i. It is also dropped if it scores above
    sim(q_i, d_i) + `margin`, at least 0, in units of the similarity.
    """

    def __init__(self, similarity_fct: Callable[[Tensor, Tensor], Tensor], margin: float) -> None:
        if margin < 0:
            raise ValueError(f"false_negative_margin must be at least 0 (or None for off), got {margin}.")
        self.similarity_fct, self.margin = similarity_fct, margin
        self.__name__ = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)  # for the model card
        self._contents: list[Tensor] = []
        self._pending: list[str] = []
        self._positive = torch.zeros(0)

    def begin(self, contents: list[Tensor], directions: tuple[str, ...]) -> None:
        """Name the rows of the loss value that is computed next: fingerprints of each column of the whole batch."""
        self._contents = contents
        self._pending = [direction for direction in _ORDER if direction in directions]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities (rows of `a`, rows of `b`) with -inf at dropped negatives."""
        similarity = self.similarity_fct(a, b)
        direction = self._pending.pop(0)
        query, positive = self._contents[:2]
        batch_size = len(query)
        if direction == "query_to_doc":
            self._positive = similarity.detach()[:, :batch_size].diagonal()
        anchors, candidates = direction.split("_to_")
        # By content: what the batch pairs with the anchor elsewhere.
        if candidates == "doc":
            drop = _answers(query, positive, torch.cat(self._contents[1:]))
        else:
            drop = _answers(positive, query, query)
        # By score. The loss transposes the matrices of document anchors after this call.
        oriented = similarity.detach() if anchors == "query" else similarity.detach().T
        drop |= oriented > self._positive[:, None] + self.margin
        drop[:, :batch_size].fill_diagonal_(False)  # the own row stays
        return similarity.masked_fill(drop if anchors == "query" else drop.T, -torch.inf)


def _answers(anchor: Tensor, other: Tensor, candidates: Tensor) -> Tensor:
    """(B, candidates): whether some row pairs the content of anchor i with the content of the candidate."""
    same_anchor = anchor[:, None] == anchor[None]  # (B, B)
    same_other = other[:, None] == candidates[None]  # (B, candidates)
    return (same_anchor.float() @ same_other.float()) > 0
