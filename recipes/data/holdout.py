"""A validation part of the training data that shares no content with what is trained on, and its evaluators.

Rows that share content form one group, across all sources (MSCOCO_i2t and MSCOCO_t2i hold the same photographs), and
whole groups go to either part. Content is compared by digest, not by file name.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from recipes.data.searches import retrieval_of
from recipes.data.training_pairs import Source

logger = logging.getLogger(__name__)

_LONGEST_LABEL = 100  # characters


def hold_out(
    sources: Sequence[Source], size: int, seed: int = 0, *, share: float = 0.1
) -> tuple[list[Source], list[Source]]:
    """Split every source into a training and a validation part without shared content.

    Two rows share content if a medium (image, or the frames of a video) or the whole text of a side without media
    occurs in both, on whichever side. Labels are not content in this sense, as they have to occur in both parts: the
    texts of positives if all are short and occur twice on average (`has_labels`). Takes about 40 s per million rows.

    Args:
        sources: Checked sources.
        size: Validation rows per source; fewer where its groups are too large to fit.
        seed: Seed of the choice.
        share: Largest part of a source that is held out, in (0, 1). Default a tenth.

    Returns:
        Training parts (all sources) and validation parts (those that have at least two rows held out).
    """
    if not size:
        return list(sources), []
    groups = _groups(sources)
    room = np.array([min(size, int(len(group) * share)) for group in groups])
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    labels = np.concatenate(groups)
    order = np.argsort(labels, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    chosen = []
    for label in np.random.default_rng(seed).permutation(len(bounds) - 1):
        if not room.any():
            break
        counts = np.bincount(owners[order[bounds[label] : bounds[label + 1]]], minlength=len(groups))
        if (counts <= room).all():
            chosen.append(label)
            room -= counts
    training, validation = [], []
    for source, group in zip(sources, groups, strict=True):
        held = np.isin(group, chosen)
        if held.sum() == 1 and np.bincount(labels)[group[held][0]] == 1:
            held[:] = False  # one row can't be searched in; it trains, as nothing that is held out shares its content
        training.append(source.select(np.flatnonzero(~held)))
        if held.sum() > 1:
            validation.append(source.select(np.flatnonzero(held)))
        else:
            logger.warning(
                "%s has no validation part: at most %d of its %d rows may be held out, and no two were found that "
                "share no content with the rest",
                source.name,
                min(size, int(len(group) * share)),
                len(group),
            )
    return training, validation


def _groups(sources: Sequence[Source]) -> list[np.ndarray]:
    """A group number for each row of each source."""
    rows, keys = array("q"), array("q")
    known: dict[str, int] = {}
    total = 0
    for source in sources:
        labels = has_labels(source)
        for record in source.pairs:
            for key in contents(record, labels):
                rows.append(total)
                keys.append(known.setdefault(key, len(known)))
            total += 1
    size = total + len(known)
    ends = np.frombuffer(rows, np.int64), np.frombuffer(keys, np.int64) + total
    links = coo_matrix((np.ones(len(rows), np.int8), ends), (size, size))
    _, found = connected_components(links, directed=False)
    _, found = np.unique(found[:total], return_inverse=True)
    return np.split(found, np.cumsum([len(source.pairs) for source in sources])[:-1])


def contents(record: Mapping[str, Mapping[str, Any]], labels: bool) -> list[str]:
    """What a row must not share with one of the other part: its media by digest, and its texts without media.

    Args:
        record: The row's sides, as `Side`s.
        labels: Whether the texts of its positives and negatives are labels.

    Returns:
        A key for each.
    """
    return [
        side["digest"] or "text " + side["text"].strip()
        for column, side in record.items()
        if side["digest"] or column == "query" or not labels
    ]


def has_labels(source: Source) -> bool:
    """Whether the texts of a source's positives are labels, which is logged: all short, and twice there on average.

    A passage under several questions repeats too. It is content: one that was trained on must not be held out.
    """
    texts = [side["text"].strip() for side in source.pairs["positive"] if not side["digest"]]
    different = set(texts)
    if not texts or 2 * len(different) > len(texts) or max(map(len, different)) > _LONGEST_LABEL:
        return False
    logger.info(
        "%s: the %d texts of positive (such as %r) stand under %d rows, so they are taken for labels: they occur in "
        "training and in held-out rows alike, and only queries and media are kept apart",
        source.name,
        len(different),
        texts[0],
        len(texts),
    )
    return True


PromptOf = Callable[[str, str], str]  # name of a source, side -> prompt


class HeldOutEvaluator(InformationRetrievalEvaluator):
    """Search of a source's held-out positives by its held-out queries; media are decoded a few batches at a time.

    Args:
        source: The validation part.
        batch_size: Inputs per forward pass.
        backwards: Search of the queries by the positives instead; `-backwards` is then part of the name.
        prompt_of: The prompt that a side of the source is trained with. Default: the model's own.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 32,
        *,
        backwards: bool = False,
        prompt_of: PromptOf | None = None,
    ) -> None:
        asked, sought = ("positive", "query") if backwards else ("query", "positive")
        queries, corpus, relevant = retrieval_of(source, asked, sought)
        super().__init__(
            queries=queries,  # type: ignore[arg-type]  # places in the source, resolved by embed_inputs
            corpus=corpus,  # type: ignore[arg-type]
            relevant_docs=relevant,
            name=f"{source.name}-backwards" if backwards else source.name,
            accuracy_at_k=[1],
            precision_recall_at_k=[1],
            mrr_at_k=[10],
            ndcg_at_k=[10],
            map_at_k=[10],
            batch_size=batch_size,
            write_csv=False,
            query_prompt=prompt_of(source.name, asked) if prompt_of else None,
            corpus_prompt=prompt_of(source.name, sought) if prompt_of else None,
        )
        self.source = source

    def embed_inputs(self, model: SentenceTransformer, sentences: Sequence[Any], **options: Any) -> torch.Tensor:
        """Embeddings of the rows and sides named by `sentences`."""
        step = 4 * self.batch_size
        parts = []
        for start in range(0, len(sentences), step):
            inputs = self.source.read_all(sentences[start : start + step])
            parts.append(super().embed_inputs(model, inputs, **options))
        return torch.cat(parts)


def mean_of_sources(
    validation: Sequence[Source], batch_size: int = 32, prompt_of: PromptOf | None = None
) -> SequentialEvaluator:
    """One evaluator over all validation parts, in both directions; its score is the plain mean of their nDCG@10."""
    parts = [
        HeldOutEvaluator(source, batch_size, backwards=backwards, prompt_of=prompt_of)
        for source in validation
        for backwards in (False, True)
    ]
    return SequentialEvaluator(parts, main_score_function=lambda scores: float(np.mean(scores)))
