"""The image families of MMEB-V2: rows with a query and its own list of candidates, the right one first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.dataset import MMEBDataset
from evaluation.media import enlarged
from evaluation.mmeb_v2.image_texts import IMAGE_TOKEN, candidate_parts, candidate_texts, query_parts, query_text
from evaluation.mmeb_v2.sources import DataRoot, read_table
from evaluation.pool import Item, LoadedDataset, SplitBuilder, sampled_rows


def load_image(row: MMEBDataset, root: DataRoot, fraction: float = 1.0, seed: int = 0) -> LoadedDataset:
    """Load one image data set.

    Args:
        row: The data set; families `text` (candidates are strings), `image` (images, known by path) and `captioned`
            (images, known by path and caption; the query has an image too).
        root: Where the annotation table and the images are.
        fraction: Part of the queries to keep, in (0, 1].
        seed: Seed of that choice.

    Returns:
        mteb's data with local candidate lists (global for labels under `btoks`), and the broken rows.
    """
    table = read_table(row, root)
    builder = SplitBuilder(row)
    images = _Images(row, root, builder)
    if row.candidates == "global":  # the labels of every row are the pool, also of rows that are not asked
        for index, record in enumerate(table):
            for item in _ranked(row, _candidates(row, record, images)):
                builder.offer(index, item)
    for index in sampled_rows(len(table), fraction, seed):
        record = table[index]
        path = record["qry_img_path"] if row.family != "image" else ""
        if row.family != "image" and not path:
            builder.skip(index, "column qry_img_path is empty, but this data set's queries have an image")
            continue
        candidates = _candidates(row, record, images)
        if not candidates:
            builder.skip(index, "its candidate list is empty")
            continue
        instruction, body = query_parts(row, record)
        shown = images.shown(path) if path else None
        query = Item("query", query_text(row, record), image=shown, instruction=instruction, body=body)
        if not path and IMAGE_TOKEN in record.get("qry_inst", record["qry_text"]):
            builder.remark("text-only queries that name an image, which is left out")
        own = None if row.candidates == "global" else _ranked(row, candidates)
        builder.ask(index, query, {candidates[0].key: 1}, own)
    return builder.build()


class _Images:
    """The images of one data set by the path in its rows; looked up once each, as a thousand lists share them."""

    def __init__(self, row: MMEBDataset, root: DataRoot, builder: SplitBuilder) -> None:
        self._row, self._root, self._builder = row, root, builder
        self._known: dict[str, str | bytes] = {}

    def shown(self, path: str) -> str | bytes:
        """The image's own path, or the image enlarged where the harness enlarges it; empty for no path."""
        if path not in self._known:
            self._known[path] = enlarged(str(self._root.media(self._row, path))) if path else ""
            if isinstance(self._known[path], bytes):
                self._builder.remark("images enlarged to 56 x 56")
        return self._known[path]


def _candidates(row: MMEBDataset, record: Mapping[str, Any], images: _Images) -> list[Item]:
    if row.family == "text":
        return [Item(text or "", text or "") for text in record["tgt_text"]]
    paths = list(record["tgt_img_path"])
    captions = [caption or "" for caption in record["tgt_text"]]
    captions = captions if len(captions) == len(paths) else [""] * len(paths)
    items = []
    for path, caption, text in zip(paths, captions, candidate_texts(row, record, len(paths)), strict=True):
        key = path if row.family == "image" else f"{path}:{caption.strip(chr(34))}"
        instruction, body = candidate_parts(row, record, caption)
        items.append(Item(key, text, image=images.shown(path), instruction=instruction, body=body))
    return items


def _ranked(row: MMEBDataset, candidates: list[Item]) -> list[Item]:
    """The candidates that are ranked: the harness keeps blank ones (OK-VQA has some), the release drops them."""
    return [item for item in candidates if not item.blank] if row.protocol == "btoks" else candidates
