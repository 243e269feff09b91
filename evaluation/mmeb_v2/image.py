"""The image families of MMEB-V2: rows with a query and its own list of candidates, the right one first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.dataset import MMEBDataset
from evaluation.mmeb_v2.sources import DataRoot, read_table
from evaluation.pool import Item, LoadedDataset, SplitBuilder, sampled_rows

_IMAGE_TOKEN = "<|image_1|>"  # stands for the image in the hub's texts; chat templates place it themselves


def load_image(row: MMEBDataset, root: DataRoot, fraction: float = 1.0, seed: int = 0) -> LoadedDataset:
    """Load one image data set.

    Args:
        row: The data set; families `text` (candidates are strings), `image` (images, known by path) and `captioned`
            (images, known by path and caption; the query has an image too).
        root: Where the annotation table and the images are.
        fraction: Part of the queries to keep, in (0, 1].
        seed: Seed of that choice.

    Returns:
        mteb's data with local candidate lists, and the broken rows.
    """
    table = read_table(row, root)
    builder = SplitBuilder(row)
    for index in sampled_rows(len(table), fraction, seed):
        record = table[index]
        query = _query(row, root, record)
        if row.family != "image" and query.image is None:
            builder.skip(index, "column qry_img_path is empty, but this data set's queries have an image")
            continue
        candidates = _candidates(row, root, record)
        if not candidates:
            builder.skip(index, "its candidate list is empty")
            continue
        builder.ask(index, query, {candidates[0].key: 1}, candidates)
    return builder.build()


def _query(row: MMEBDataset, root: DataRoot, record: Mapping[str, Any]) -> Item:
    path = record["qry_img_path"] if row.family != "image" else ""
    text = _fill(row.query_text, record, "qry_text", "qry_inst")
    return Item("query", text, image=str(root.media(row, path)) if path else None)


def _candidates(row: MMEBDataset, root: DataRoot, record: Mapping[str, Any]) -> list[Item]:
    texts = list(record["tgt_text"])
    if row.family == "text":
        return [Item(text, text) for text in texts]
    paths = list(record["tgt_img_path"])
    captions = texts if len(texts) == len(paths) else [""] * len(paths)
    items = []
    for path, caption in zip(paths, captions, strict=True):
        text = _fill(row.candidate_text, {**record, "tgt_text": caption}, "tgt_text", "tgt_inst")
        key = path if row.family == "image" else f"{path}:{caption.strip(chr(34))}"
        items.append(Item(key, text, image=str(root.media(row, path)) if path else ""))
    return items


def _fill(template: str, record: Mapping[str, Any], column: str, instruction_column: str) -> str:
    """The official text of a query or candidate from either repository.

    TIGER-Lab/MMEB-eval has no instruction columns: there the text column already holds instruction and body.
    """
    body = (record[column] or "").replace(_IMAGE_TOKEN, "")
    if instruction_column in record or "qry_inst" in record:
        text = template.format_map({**record, column: body.strip()})
    else:
        text = body.strip() + template[len(template.rstrip()) :]
    return text.replace(" \n", "\n")
