"""Searches that a model is scored on: queries, documents, and which documents are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from recipes.data.training_pairs import Source, content_key

# Every comparison with NaN is false, so it would stand before, or behind, all others and tell nobody.
NOT_FINITE = "the model gives it a vector with NaN or infinity: it is broken, or its type (--dtype) too small"


@dataclass(frozen=True)
class Search:
    """Queries with the documents to find.

    Args:
        name: Its name in tables.
        queries: The queries, or what `load` makes inputs from.
        documents: The documents, or what `load` makes inputs from.
        relevant: Numbers of the right documents of every query.
        load: Turns a few queries or documents into inputs of sentence-transformers, when their batch comes.
        batch_size: Inputs per forward pass.
    """

    name: str
    queries: Sequence[Any]
    documents: Sequence[Any]
    relevant: Sequence[set[int]]
    load: Callable[[Sequence[Any]], list[Any]] = list
    batch_size: int = 32

    def ranks(self, model: SentenceTransformer) -> np.ndarray:
        """(Q,) rank of the best right document of every query, from 1; equal scores count against it.

        Raises:
            ValueError: If a vector is not finite.
        """
        queries = self._embed(model.encode_query, self.queries, "query")
        documents = self._embed(model.encode_document, self.documents, "document")
        ranks = []
        for query, right in zip(queries, self.relevant, strict=True):
            scores = documents @ query
            wrong = np.ones(len(scores), bool)
            wrong[list(right)] = False
            ranks.append(1 + int((scores[wrong] >= scores[~wrong].max()).sum()))
        return np.array(ranks)

    def _embed(self, encode: Callable[..., np.ndarray], inputs: Sequence[Any], side: str) -> np.ndarray:
        parts = []
        for start in range(0, len(inputs), 8 * self.batch_size):
            batch = self.load(inputs[start : start + 8 * self.batch_size])
            parts.append(encode(batch, batch_size=self.batch_size, show_progress_bar=False))
        vectors = np.concatenate(parts).astype(np.float64)
        broken = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(broken):
            raise ValueError(
                f"vectors must be finite to be ranked, but {side} {broken[0]} of {self.name!r} has NaN or infinity "
                f"({len(broken)} of {len(vectors)} have). The model is broken or its training diverged: lower the "
                "learning rate, or take --dtype float32."
            )
        return vectors


def retrieval_of(
    source: Source, asked: str, sought: str
) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, str]], dict[str, set[str]]]:
    """The search of one side of pairs by another, such as `query`; equal contents are one query, or one document.

    Returns:
        Queries and documents by content, each as its row and side, and the right documents of every query.
    """
    queries: dict[str, tuple[int, str]] = {}
    documents: dict[str, tuple[int, str]] = {}
    relevant: dict[str, set[str]] = {}
    for row, record in enumerate(source.pairs):
        query, document = content_key(record[asked]), content_key(record[sought])
        queries.setdefault(query, (row, asked))
        documents.setdefault(document, (row, sought))
        relevant.setdefault(query, set()).add(document)
    return queries, documents, relevant


def searches_of(source: Source, batch_size: int) -> list[Search]:
    """Search of the held-out positives by the queries, and the other way round."""
    found = []
    for asked, sought in (("query", "positive"), ("positive", "query")):
        queries, documents, relevant = retrieval_of(source, asked, sought)
        place = {document: number for number, document in enumerate(documents)}
        right = [{place[document] for document in relevant[query]} for query in queries]
        name = f"{source.name}: {asked} → {sought}"
        places = list(queries.values()), list(documents.values())
        found.append(Search(name, *places, right, source.read_all, batch_size))
    return found
