"""The visual documents of MMEB-V2: queries, pages and graded relevance as three hub configurations."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, Image

from evaluation.dataset import PAGE_SPLITS, MMEBDataset, PageSplit
from evaluation.media import PROMPT_COLUMN, BrokenMediaError, check_image
from evaluation.mmeb_v2.protocols import finished
from evaluation.mmeb_v2.sources import DataRoot, read_table
from evaluation.mmeb_v2.visdoc_rows import BROKEN_PAGE_HUB_IDS
from evaluation.pool import (
    BrokenRow,
    Item,
    LoadedDataset,
    content_key,
    data_digest,
    sampled_rows,
    shown,
    to_dataset,
)

logger = logging.getLogger(__name__)


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
    corpus, contents, left_out = _pages(row, root, broken)
    relevant = _relevance(row, root, contents.keys(), left_out, broken)
    table = read_table(row, root, "queries")
    asked: dict[str, Item] = {}
    skipped, start = 0, row.query_text.split("{")[0]
    for index in sampled_rows(len(table), fraction, seed):
        query_id, text = f"q{table[index]['query-id']}", table[index]["query"]
        reason = "no usable right page" if query_id not in relevant else ""
        reason = "its id has occurred before" if query_id in asked else reason
        reason = reason if (text or "").strip() else "empty query"
        if reason:
            skipped += 1
            broken.append(BrokenRow(row.name, index, f"query {query_id} skipped: {reason}"))
            continue
        whole = finished(row, row.query_text.format(query=text))
        asked[query_id] = Item("query", whole, instruction=start.strip(), body=finished(row, text))
    for entry in broken:
        logger.warning("%s, row %d: %s", entry.dataset, entry.index, entry.reason)
    if not asked:
        raise ValueError(f"{row.name} has no usable query: {len(broken)} broken rows, {len(corpus)} pages")
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # when a task is built: it takes seconds

    chosen = {query_id: relevant[query_id] for query_id in asked}
    data = RetrievalSplitData(
        corpus=corpus,
        queries=to_dataset([(query_id, shown(item, row.inputs)) for query_id, item in asked.items()]),
        relevant_docs=chosen,
        top_ranked=None,
    )
    digest = data_digest({query_id: item.content() for query_id, item in asked.items()}, contents, chosen, None)
    told = {"query": start.strip(), "document": row.candidate_text.strip()}
    return LoadedDataset(data, tuple(broken), skipped, digest, instructions=told)


def _pages(row: MMEBDataset, root: DataRoot, broken: list[BrokenRow]) -> tuple[Dataset, dict[str, bytes], set[str]]:
    """The corpus with columns id, image, text; each page's hash; and the pages left out, which can't be decoded."""
    table = read_table(row, root, "corpus")
    if not isinstance(table, Dataset):
        raise TypeError(f"{row.name}: the corpus must be a parquet table with an image column, got JSON")
    if row.num_candidates and len(table) < row.num_candidates:
        broken.append(BrokenRow(row.name, len(table), f"the corpus has {len(table)} of {row.num_candidates} pages"))
    raw = table.cast_column("image", Image(decode=False))
    contents: dict[str, bytes] = {}
    left_out: set[str] = set()
    kept = []
    for index, record in enumerate(raw):
        page_id, image = f"p{record['corpus-id']}", record["image"] or {}
        source = image.get("bytes") or image.get("path")
        try:
            if page_id in contents:
                continue  # the pool keeps the first candidate of each identity
            if not source:
                raise BrokenMediaError("column image is empty")
            check_image(source)
        except BrokenMediaError as error:
            broken.append(BrokenRow(row.name, index, f"page {page_id} left out: {error}"))
            left_out.add(page_id)
            continue
        contents[page_id] = content_key(source if isinstance(source, bytes) else Path(source).read_bytes())
        kept.append(index)
    page = shown(Item("", row.candidate_text, instruction=row.candidate_text.strip()), row.inputs, candidate=True)
    pages = table.cast_column("image", Image()).select(kept).select_columns(["image"])
    pages = pages.add_column("id", list(contents)).add_column("text", [page.text] * len(contents))
    if page.instruction:
        pages = pages.add_column(PROMPT_COLUMN, [page.instruction] * len(contents))
    return pages, contents, left_out


def _relevance(
    row: MMEBDataset, root: DataRoot, known: Collection[str], left_out: Collection[str], broken: list[BrokenRow]
) -> dict[str, dict[str, int]]:
    """Query id -> page id -> grade; grades above 0 only, the larger of two judgements of the same pair."""
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    for index, record in enumerate(read_table(row, root, "qrels")):
        query_id, page_id, grade = f"q{record['query-id']}", f"p{record['corpus-id']}", int(record["score"])
        if grade > 0 and page_id in known:
            relevant[query_id][page_id] = max(grade, relevant[query_id].get(page_id, 0))
        elif grade > 0 and page_id not in left_out:
            reason = f"page {page_id}, right for query {query_id}, is not in the corpus"
            broken.append(BrokenRow(row.name, index, reason))
    return dict(relevant)
