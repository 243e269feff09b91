"""Readers of the MMEB-V2 training mix in its hub layout, from a local copy first, else from the hub.

Below the data root: an unpacked snapshot of each repository under `<owner>/<name>` or `<name>` (MMEB-train after its
`unzip_file.py`, the video frames unpacked inside `train_300k/`). Rows are read as they are on the hub; the text given
to the model is the authors', without the media placeholders, which the model's template puts on their own lines.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from huggingface_hub import hf_hub_download

from evaluation.media import choose_frames, stored_frames
from evaluation.mmeb_v2.sources import DataRoot, read_table
from recipes.data.mmeb_train_sources import MMEB_TRAIN, VISRAG_PAGE, VISRAG_QUERY, MMEBTrainSource
from recipes.data.training_pairs import BrokenRowError, Side, Source, check_source

_PLACEHOLDERS = ("<|image_1|>", "<image>", "<|image_pad|>", "<video>", "<|video_pad|>")
_CONVERSATION = Features({"video": Value("string"), "question": Value("string"), "answer": Value("string")})


def load_mmeb_train(
    data_root: str,
    names: Sequence[str] = (),
    *,
    offline: bool = False,
    max_rows: int | None = None,
    **check: Any,
) -> list[Source]:
    """Load sources of the mix, in the order of `MMEB_TRAIN`.

    Args:
        data_root: Folder with the local copies.
        names: Sources to load; all 25 by default.
        offline: Never ask the hub for an annotation table. Media are always local.
        max_rows: Use the first rows of each source only.
        **check: For `check_source`: `on_error`, `check_media`, `num_proc`, `recheck`.
    """
    unknown = set(names) - {source.name for source in MMEB_TRAIN}
    if unknown:
        raise ValueError(f"unknown sources {sorted(unknown)}; there are {[source.name for source in MMEB_TRAIN]}")
    root = DataRoot(Path(data_root), offline)
    chosen = [source for source in MMEB_TRAIN if not names or source.name in names]
    return [_load(source, root, max_rows, check) for source in chosen]


def _load(source: MMEBTrainSource, root: DataRoot, max_rows: int | None, check: Mapping[str, Any]) -> Source:
    table: Any = read_conversations(source, root) if source.file else read_table(source, root)  # type: ignore[arg-type]
    if not isinstance(table, Dataset):
        table = Dataset.from_list(list(table))
    if max_rows is not None:
        table = table.select(range(min(max_rows, len(table))))
    return check_source(
        source.name,
        table,
        partial(READERS[source.family], source=source, root=root),
        weight=source.weight,
        target=source.target,
        instructions=instructions(source),
        hub_id=source.hub_id,
        **check,
    )


def instructions(source: MMEBTrainSource) -> tuple[str, ...]:
    """Everything that may precede a text's own content, as it stands in the texts."""
    if source.family == "visrag":
        return (*VISRAG_QUERY.values(), *VISRAG_PAGE.values())
    found = [source.query_instruction, source.positive_instruction]
    if source.name == "VisDial":  # here the instruction's last token takes the newline in
        found.append(source.query_instruction + "\n")
    return tuple(filter(None, found))


def read_mmeb(record: Mapping[str, Any], source: MMEBTrainSource, root: DataRoot) -> dict[str, Side]:
    """MMEB-train: `qry`, `pos_text` and `neg_text` hold instruction and content, the `..._image_path`s a file."""
    sides = {}
    for side, text_column, path_column in (
        ("query", "qry", "qry_image_path"),
        ("positive", "pos_text", "pos_image_path"),
        ("negative", "neg_text", "neg_image_path"),
    ):
        text, path = record.get(text_column) or "", (record.get(path_column) or "").strip()
        if side == "negative" and not text.strip():
            if not path:
                continue
            # VisDial's negatives lack the wording of the positives, which would give them away.
            text = source.positive_instruction
        sides[side] = Side(_mmeb_text(source, side, text, bool(path)), str(root.media(source, path)) if path else "")
    return sides


def _mmeb_text(source: MMEBTrainSource, side: str, text: str, has_image: bool) -> str:
    """The authors' rules: own line for the image, one closing newline on image sides, raw text otherwise."""
    had_placeholder = any(placeholder in text for placeholder in _PLACEHOLDERS)
    text = _without_placeholders(text)
    if has_image or (side == "query" and had_placeholder):  # WebQA's queries name an image that they don't have
        text = text.strip(" \t\n")
        text = f"{text}\n" if text else ""
    if source.name == "VisDial" and side == "query":
        text = text.replace(f"{source.query_instruction} Q:", f"{source.query_instruction}\nQ:", 1)
    if source.name == "ChartQA" and side != "query":
        text = text.rstrip(" \t")
    return text


def _without_placeholders(text: str) -> str:
    for placeholder in _PLACEHOLDERS:
        text = text.replace(placeholder, "")
    return text


def read_colpali(record: Mapping[str, Any], source: MMEBTrainSource, root: DataRoot) -> dict[str, Side]:
    """colpali_train_set: page image and question, to the answer; the options of a choice belong to the question."""
    answer, options = _text(record, "answer"), record.get("options") or ""
    query = _text(record, "query")
    choices = _choices(options)
    if choices:
        query = f"{query} Options: {options}"
        number = "ABCDE".find(answer) if len(answer) == 1 else -1
        if 0 <= number < len(choices):
            letter, answer = answer, choices[number]
            answer = answer.removeprefix(f"{letter}. ").removeprefix(f"{letter}) ")
    return {"query": Side(query, column="image"), "positive": Side(answer)}


def _choices(options: str | list[str]) -> list[str]:
    if isinstance(options, list):
        return [str(option) for option in options]
    try:
        parsed = ast.literal_eval(options) if options else []
    except (SyntaxError, ValueError):
        return []
    return [str(option) for option in parsed] if isinstance(parsed, list) else []


def read_visrag(record: Mapping[str, Any], source: MMEBTrainSource, root: DataRoot) -> dict[str, Side]:
    """VisRAG in-domain: a query worded by the kind of document, to the page."""
    kind = record.get("source") or ""
    query = VISRAG_QUERY.get(kind, "") + _text(record, "query")
    return {"query": Side(query), "positive": Side(VISRAG_PAGE.get(kind, ""), column="image")}


def read_video_caption(record: Mapping[str, Any], source: MMEBTrainSource, root: DataRoot) -> dict[str, Side]:
    """LLaVA-Hound: a video with its captioning prompt, to the caption."""
    return {
        "query": Side(_text(record, "question", required=False), video=_frames(record, source, root)),
        "positive": Side(_text(record, "answer").rstrip()),
    }


def read_caption_video(record: Mapping[str, Any], source: MMEBTrainSource, root: DataRoot) -> dict[str, Side]:
    """LLaVA-Hound the other way round: the caption, to the video."""
    return {
        "query": Side(f"{source.query_instruction} {_text(record, 'answer')}"),
        "positive": Side(source.positive_instruction, video=_frames(record, source, root)),
    }


def read_video_qa(record: Mapping[str, Any], source: MMEBTrainSource, root: DataRoot) -> dict[str, Side]:
    """LLaVA-Hound: a video with a question, to the answer."""
    query = f"{source.query_instruction}\n{_text(record, 'question')}"
    return {
        "query": Side(query, video=_frames(record, source, root)),
        "positive": Side(_text(record, "answer")),
    }


READERS = {
    "mmeb": read_mmeb,
    "colpali": read_colpali,
    "visrag": read_visrag,
    "video_caption": read_video_caption,
    "caption_video": read_caption_video,
    "video_qa": read_video_qa,
}


def _text(record: Mapping[str, Any], column: str, required: bool = True) -> str:
    text = _without_placeholders(record.get(column) or "").strip("\n").strip(" ")
    if required and not text.strip():
        raise BrokenRowError(f"column {column} is empty")
    return text


def _frames(record: Mapping[str, Any], source: MMEBTrainSource, root: DataRoot) -> tuple[str, ...]:
    """Eight evenly spread frames of `train_300k/<video>/`, as in the evaluation."""
    video = record.get("video") or ""
    if not video:
        raise BrokenRowError("column video is empty")
    return choose_frames(stored_frames(root.media(source, "train_300k", video)))


def read_conversations(source: MMEBTrainSource, root: DataRoot) -> Dataset:
    """The annotation file of a video source as columns `video`, `question`, `answer`; cached by `datasets`.

    Raises:
        FileNotFoundError: Not below the data root, and `root.offline` is set.
    """
    file = root.media(source, source.file)  # type: ignore[arg-type]
    if not file.is_file():
        if root.offline:
            raise FileNotFoundError(
                f"{source.name} needs {source.file} of {source.hub_id}, and it is not at {file}. "
                "Put a snapshot of the repository below the data root, or allow the hub."
            )
        file = Path(hf_hub_download(source.hub_id, source.file, repo_type="dataset", revision=source.revision))
    # The time is an argument, so that a changed file is not taken for the cached one.
    stamp = {"file": str(file), "modified": file.stat().st_mtime_ns}
    return Dataset.from_generator(_conversations, features=_CONVERSATION, gen_kwargs=stamp)


def _conversations(file: str, modified: int) -> Iterator[dict[str, str]]:
    """A damaged line becomes an empty row, which the check reports with its index."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                turns = [str(turn["value"]) for turn in entry["conversations"][:2]]
                yield {"video": str(entry["video"]), "question": turns[0], "answer": turns[1]}
            except (ValueError, KeyError, TypeError, IndexError):
                yield {"video": "", "question": "", "answer": ""}
