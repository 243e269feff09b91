"""Texts of the image families, character by character as the benchmark's harness makes them of a row's columns.

The harness (github TIGER-AI-Lab/VLM2Vec 6e1e1d4, `src/data/eval_dataset/image_*.py`) puts an instruction column and a
body together, each family with its own whitespace. What only the rows on the hub decide stays with them: whether an
instruction ends in a newline (candidates of CIRR, NIGHTS, FashionIQ and the crops), and whether it names an image
that a text-only query doesn't have (WebQA, EDIS). Of the latter the harness shows the model's image token; that can't
be followed: transformers refuses a text with such a token and no image, and bottleneck-token models spell it out. It
is left out, as in the release, and the number of such rows is reported. Rows of TIGER-Lab/MMEB-eval have no
instruction columns: their texts are ready and are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.dataset import MMEBDataset
from evaluation.mmeb_v2.protocols import CROP, clean_lines, finished

IMAGE_TOKEN = "<|image_1|>"
"""Stands for an image in the hub's texts, whatever the model."""


def query_text(row: MMEBDataset, record: Mapping[str, Any]) -> str:
    """Text of a query, without the token of its own image, which the model's template places.

    Args:
        row: The data set.
        record: Its row.

    Returns:
        The text.
    """
    if row.protocol == "btoks":
        return _released_query(row, record)
    body = record["qry_text"] or ""
    has_columns = "qry_inst" in record
    instruction = (record["qry_inst"] or "") if has_columns else ""
    if row.family == "image":
        text = f"{instruction} {body}\n" if has_columns else body
        if has_columns and row.name == "VisDial":
            text += "\n"
        return _without_token(text)
    if not has_columns:
        return _without_token(body)
    instruction = instruction.replace(IMAGE_TOKEN, "")
    # questions, composed queries and grounding strip the instruction; labels and captions keep its tail
    if row.group == "I-QA" or row.family == "captioned":
        instruction = instruction.strip()
    text = f"{instruction} {body}" if body else instruction
    return _without_token(text.replace(" \n", "\n") + "\n")


def _released_query(row: MMEBDataset, record: Mapping[str, Any]) -> str:
    """A query as the release's parsers make it (`mmeb_v2/parsers/image_*.py`).

    Ready texts pass as they are; where a row has an instruction, it is stripped, and the two are put together. Odd
    whitespace of the body stays, but for VizWiz, WebQA and EDIS, whose lines are cleaned, and VisDial's final newline.
    """
    text = record["qry_text"] or ""
    if "qry_inst" in record:
        text = _released(record["qry_inst"], text, keep_blanks=row.family == "image")
    text = _without_token(text)
    if row.name in ("VizWiz", "WebQA", "EDIS"):
        end = "\n" if text.endswith("\n") else ""
        cleaned = clean_lines(text)
        return cleaned.rstrip("\n") + end if row.name == "VizWiz" else cleaned.lstrip("\n")
    if row.name == "VisDial":
        text = text[:-1] if text.endswith("\n\n") else text
        start, colon, dialogue = text.partition(": ")
        if colon and (dialogue.startswith("Q:") or "\nQ:" in dialogue or "\nA:" in dialogue):
            return f"{start}:\n{dialogue}"
    return text


def _released(instruction: str | None, body: str, *, keep_blanks: bool = False) -> str:
    told = (instruction or "").replace(IMAGE_TOKEN, "").strip()
    text = f"{told} {body}" if body else told
    return (text if keep_blanks else text.replace(" \n", "\n")) + "\n"


def query_parts(row: MMEBDataset, record: Mapping[str, Any]) -> tuple[str, str | None]:
    """Instruction and body of a query, apart from each other.

    Args:
        row: The data set.
        record: Its row.

    Returns:
        The instruction, empty where there is none, and the rest of the text; `None` for the rest where the row's text
        is ready, so that the two can't be told apart.
    """
    if "qry_inst" not in record:
        return "", None
    return _parts(row, record["qry_inst"], record["qry_text"])


def candidate_parts(row: MMEBDataset, record: Mapping[str, Any], caption: str) -> tuple[str, str | None]:
    """Instruction and body of a candidate with an image; see `query_parts`.

    Args:
        row: The data set; family `image` or `captioned`.
        record: Its row.
        caption: The candidate's caption.

    Returns:
        The instruction and the caption.
    """
    return _parts(row, record["tgt_inst"], caption) if "qry_inst" in record else ("", None)


def _parts(row: MMEBDataset, instruction: str | None, body: str | None) -> tuple[str, str]:
    bare = _without_token(body or "")
    return (instruction or "").replace(IMAGE_TOKEN, "").strip(), finished(row, bare) if bare.strip() else ""


def candidate_texts(row: MMEBDataset, record: Mapping[str, Any], count: int) -> list[str]:
    """Texts of a row's candidates with images, in order, without the token of the image.

    Args:
        row: The data set; family `image` or `captioned`.
        record: Its row.
        count: Number of candidates, for rows without captions.

    Returns:
        One text each: instruction and caption, or the instruction alone where the first caption is blank.
    """
    captions = [caption or "" for caption in record["tgt_text"]]
    if len(captions) != count:
        captions = [""] * count
    if row.protocol == "btoks":
        return [_released_candidate(row, record, caption) for caption in captions]
    if "qry_inst" not in record:
        return [_without_token(caption) for caption in captions]
    instruction = (record["tgt_inst"] or "").replace(IMAGE_TOKEN, "")
    if captions and captions[0].strip():
        texts = [f"{instruction} {caption}".replace(" \n", "\n") + "\n" for caption in captions]
    else:
        # text-to-image families end in a newline of their own; the others end as their instruction does
        end = "\n" if row.family == "image" else ""
        texts = [instruction.replace(" \n", "\n") + end] * count
    return [_without_token(text) for text in texts]


def _released_candidate(row: MMEBDataset, record: Mapping[str, Any], caption: str) -> str:
    """A candidate as the release's parsers make it; a crop's sentence gets its full stop."""
    text = caption
    if "qry_inst" in record:
        text = _released(record["tgt_inst"], caption if caption.strip() else "")
    text = _without_token(text)
    if row.name in ("Visual7W-Pointing", "MSCOCO", "RefCOCO") and text.strip() in (CROP, f"{CROP}."):
        return f"{CROP}.\n"
    return text


def _without_token(text: str) -> str:
    """The text after its image token: what stands between the two is the model's template's matter."""
    return text.replace(IMAGE_TOKEN, "").lstrip(" \n")
