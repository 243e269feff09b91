"""The visual documents of MMEB-V2: queries, pages and graded relevance as three hub configurations."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from typing import Literal

from datasets import Dataset, Image

from evaluation.dataset import MMEBDataset
from evaluation.media import BrokenMediaError, check_image
from evaluation.mmeb_v2.protocols import finished
from evaluation.mmeb_v2.sources import DataRoot, read_table
from evaluation.mmeb_v2.visdoc_rows import BROKEN_PAGE_HUB_IDS
from evaluation.pool import BrokenRow, LoadedDataset, sampled_rows

logger = logging.getLogger(__name__)

PageSplit = Literal["page-fixed", "page"]
PAGE_SPLITS: tuple[PageSplit, ...] = ("page-fixed", "page")


def with_page_split(row: MMEBDataset, page_split: PageSplit) -> MMEBDataset:
    """The row that reads the chosen version of the data.

    Args:
        row: Any row.
        page_split: `page-fixed`, the leaderboard's since 2025-11-03, or `page`, the broken one before it; it only
            matters to ViDoSeek-page and MMLongBench-page.

    Returns:
        The row itself, or one with the other repository.

    Raises:
        ValueError: Unknown `page_split`.
    """
    if page_split not in PAGE_SPLITS:
        raise ValueError(f"page_split must be one of {PAGE_SPLITS}, got {page_split!r}")
    if page_split == "page-fixed" or row.name not in BROKEN_PAGE_HUB_IDS:
        return row
    hub_id = BROKEN_PAGE_HUB_IDS[row.name]
    return replace(row, hub_id=hub_id, annotation="visdoc-tasks/data/" + hub_id.split("/")[1])


def load_visdoc(row: MMEBDataset, root: DataRoot, fraction: float = 1.0, seed: int = 0) -> LoadedDataset:
    """Load one visual-document data set.

    Args:
        row: The data set, after `with_page_split`.
        root: Where the three tables are; the page images are inside the corpus table.
        fraction: Part of the queries to keep, in (0, 1]; the corpus stays whole.
        seed: Seed of that choice.

    Returns:
        mteb's data (global corpus, graded relevance) and the broken rows.

    Raises:
        ValueError: No usable query is left.
    """
    broken: list[BrokenRow] = []
    corpus = _pages(row, root, broken)
    known = set(corpus["id"])
    relevant = _relevance(row, root, known)
    table = read_table(row, root, "queries")
    ids, texts, skipped = [], [], 0
    for index in sampled_rows(len(table), fraction, seed):
        query_id, text = f"q{table[index]['query-id']}", table[index]["query"]
        reason = "empty query" if not (text or "").strip() else "" if query_id in relevant else "no usable right page"
        if reason:
            skipped += 1
            broken.append(BrokenRow(row.name, index, f"query {query_id} skipped: {reason}"))
            continue
        ids.append(query_id)
        texts.append(finished(row, row.query_text.format(query=text)))
    for entry in broken:
        logger.warning("%s, row %d: %s", entry.dataset, entry.index, entry.reason)
    if not ids:
        raise ValueError(f"{row.name} has no usable query: {len(broken)} broken rows, {len(corpus)} pages")
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # when a task is built: it takes seconds

    data = RetrievalSplitData(
        corpus=corpus,
        queries=Dataset.from_dict({"id": ids, "text": texts}),
        relevant_docs={query_id: relevant[query_id] for query_id in ids},
        top_ranked=None,
    )
    return LoadedDataset(data, tuple(broken), skipped)


def _pages(row: MMEBDataset, root: DataRoot, broken: list[BrokenRow]) -> Dataset:
    """The corpus with columns id, image, text; pages that can't be decoded are reported and left out."""
    table = read_table(row, root, "corpus")
    if not isinstance(table, Dataset):
        raise TypeError(f"{row.name}: the corpus must be a parquet table with an image column, got JSON")
    raw = table.cast_column("image", Image(decode=False))
    seen: set[str] = set()
    kept, ids = [], []
    for index, record in enumerate(raw):
        page_id, image = f"p{record['corpus-id']}", record["image"] or {}
        source = image.get("bytes") or image.get("path")
        try:
            if page_id in seen:
                continue  # the pool keeps the first candidate of each identity
            if not source:
                raise BrokenMediaError("column image is empty")
            check_image(source)
        except BrokenMediaError as error:
            broken.append(BrokenRow(row.name, index, f"page {page_id} left out: {error}"))
            continue
        seen.add(page_id)
        kept.append(index)
        ids.append(page_id)
    pages = table.cast_column("image", Image()).select(kept).select_columns(["image"])
    return pages.add_column("id", ids).add_column("text", [row.candidate_text] * len(ids))


def _relevance(row: MMEBDataset, root: DataRoot, known: set[str]) -> dict[str, dict[str, int]]:
    """Query id -> page id -> grade; grades above 0 only, the larger of two judgements of the same pair."""
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    for record in read_table(row, root, "qrels"):
        query_id, page_id, grade = f"q{record['query-id']}", f"p{record['corpus-id']}", int(record["score"])
        if grade > 0 and page_id in known:
            relevant[query_id][page_id] = max(grade, relevant[query_id].get(page_id, 0))
    return dict(relevant)
