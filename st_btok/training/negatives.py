"""Which in-batch negatives count: false negatives dropped without a guide model, and negatives of one modality only.

Both work by setting similarities to -inf before the softmax, through the `similarity_fct` of
`MultipleNegativesRankingLoss`, so they combine with every direction, partition and hardness mode of that loss.

Sources: dropping negatives that score above the positive by a margin is what GISTEmbed does with a guide model
(arXiv 2402.16829) and NV-Retriever when it mines (arXiv 2407.15831); here the trained model's own scores decide.
Negatives of the positive's modality: MM-Embed (arXiv 2411.02571), modality-aware negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st_btok.training.distributed import gather_rows
from st_btok.training.slicing import row_offsets
from st_btok.training.targets import ContentReader

# The order in which MultipleNegativesRankingLoss computes its similarity matrices.
_ORDER = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@dataclass(frozen=True)
class RowFacts:
    """What the filter needs to know of the B rows of one column.

    Attributes:
        content: (B,) int64, equal for rows of equal content (text and media), different otherwise.
        modality: (B,) int64, one bit for text and for each kind of media.
    """

    content: Tensor
    modality: Tensor

    def gathered(self) -> RowFacts:
        """The facts of the rows of all processes."""
        return RowFacts(gather_rows(self.content), gather_rows(self.modality))


def row_facts(features: dict[str, Any], reader: ContentReader) -> RowFacts:
    """Content fingerprints and modalities of one column.

    Args:
        features: The column's features.
        reader: Of the model that the features are for.

    Returns:
        Facts on the device of the features. Two different contents have the same fingerprint with probability 2^-64.
    """
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    has_text = torch.tensor([len(content.text) > 0 for content in reader.read(features)], device=ids.device)
    modality = has_text.long()
    for number, token in enumerate(reader.media_tokens.values(), start=1):
        modality = modality + ((ids == token) & mask).any(1).long() * 2**number
    # Positions count from the first real token, so that padding changes nothing.
    content = (_weights(ids.shape[1], ids.device)[(mask.cumsum(1) - 1).clamp(min=0)] * (ids + 1) * mask).sum(1)
    for key, offsets in row_offsets(features, reader.media_tokens).items():
        value = features[key]
        if value.shape[:2] == ids.shape or not value.is_floating_point():
            continue
        for row in range(len(ids)):
            part = value[offsets[row] : offsets[row + 1]]
            if part.numel():
                bits = part.contiguous().float().view(torch.int32).flatten().long()
                content[row] += (bits * _weights(len(bits), bits.device)).sum()
    return RowFacts(content, modality)


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
    sim(q_i, d_i) + `margin`, or, with `same_modality`, if its modality differs from that of i's own row.

    Args:
        similarity_fct: The similarity it wraps.
        margin: At least 0, in units of the similarity; None keeps false negatives in.
        same_modality: Whether negatives of other modalities are dropped.

    Raises:
        ValueError: If the margin is negative: the positive itself would count as false.
    """

    def __init__(
        self, similarity_fct: Callable[[Tensor, Tensor], Tensor], margin: float | None, same_modality: bool
    ) -> None:
        if margin is not None and margin < 0:
            raise ValueError(f"false_negative_margin must be at least 0 (or None for off), got {margin}.")
        self.similarity_fct, self.margin, self.same_modality = similarity_fct, margin, same_modality
        self.__name__ = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
        self._facts: list[RowFacts] = []
        self._pending: list[str] = []
        self._positive = torch.zeros(0)

    def begin(self, facts: list[RowFacts], directions: tuple[str, ...]) -> None:
        """Name the rows of the loss value that is computed next.

        Args:
            facts: One for each column, of the whole batch.
            directions: The `directions` of the ranking loss.
        """
        self._facts = facts
        self._pending = [direction for direction in _ORDER if direction in directions]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities (rows of `a`, rows of `b`) with -inf at dropped negatives."""
        similarity = self.similarity_fct(a, b)
        direction = self._pending.pop(0)
        query, docs = self._facts[0], self._facts[1:]
        batch_size = len(query.content)
        if direction == "query_to_doc":
            self._positive = similarity.detach()[:, :batch_size].diagonal()
        anchors, candidates = direction.split("_to_")
        own = query if candidates == "query" else docs[0]
        rows = [query] if candidates == "query" else docs
        drop = torch.zeros(batch_size, len(rows) * batch_size, dtype=torch.bool, device=similarity.device)
        if self.margin is not None:
            drop |= _answers(query, docs[0], rows) if candidates == "doc" else _answers(docs[0], query, rows)
            oriented = similarity.detach() if anchors == "query" else similarity.detach().T
            drop |= oriented > self._positive[:, None] + self.margin
        if self.same_modality:
            drop |= torch.cat([fact.modality for fact in rows])[None] != own.modality[:, None]
        drop[:, :batch_size].fill_diagonal_(False)  # the own row stays
        # The loss transposes the matrices of document anchors after this call.
        return similarity.masked_fill(drop if anchors == "query" else drop.T, -torch.inf)


def _answers(anchor: RowFacts, other: RowFacts, rows: list[RowFacts]) -> Tensor:
    """(B, candidates): whether some row pairs the content of anchor i with the content of the candidate."""
    content = torch.cat([fact.content for fact in rows])
    same_anchor = anchor.content[:, None] == anchor.content[None]  # (B, B)
    same_other = other.content[:, None] == content[None]  # (B, candidates)
    return (same_anchor.float() @ same_other.float()) > 0
