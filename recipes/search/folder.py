"""Files of a folder, and the items in them: what one row of the index stands for.

A text file becomes passages, a PDF its pages, a corpus (`.jsonl`) its rows, an image or a video one item each. Nothing
is opened before an item is asked for, so that a folder of a million files can be listed at once. In the place of a
folder stands a corpus alone, whose media lie in its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from st_btok import pdf_pages

KINDS = {
    "text": (".txt", ".md", ".rst", ".py", ".json", ".csv", ".tex", ".log"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "page": (".pdf",),
    "video": (".mp4", ".webm", ".mkv", ".mov", ".avi"),
}
CORPUS = ".jsonl"
KIND_OF_SUFFIX = {CORPUS: "text"} | {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
# About what an embedder of 256 to 512 tokens reads whole; a passage ends at a paragraph where there is one.
PASSAGE_CHARS = 1000
LARGEST_TEXT = 16 * 2**20


@dataclass(frozen=True)
class Source:
    """One file: its path below the folder (with `/`), what it is, and a hash of its bytes."""

    path: str
    kind: str
    content: str


@dataclass(frozen=True)
class Item:
    """One row to be: where it stands in its file, what the model reads, and what a person is shown.

    Attributes:
        place: `"page 3"`, `"line 120"`, `"row 7"`; empty where the file is one item.
        value: The model's input: a text, or a dict with a medium.
        text: What is shown of a text, at most a passage.
        last: Whether it is the last one of its file.
        kind: Where it is another than its file's: a corpus holds items of any kind.
    """

    place: str
    value: Any
    text: str = ""
    last: bool = False
    kind: str = ""


def list_sources(folder: str | Path, known: dict[str, tuple[int, int, str]] | None = None) -> Iterator[Source]:
    """All files of a kind that can be searched, in the order of their paths; hidden ones and links out are left out.

    Args:
        folder: Where to look, subfolders included; or a corpus.
        known: Size, modification time (ns) and hash by path, from an earlier run: an unchanged file is not read again.

    Yields:
        One source per file.
    """
    root, only = root_of(folder).resolve(), Path(folder).name if Path(folder).is_file() else None
    for directory, folders, names in [(str(root), [], [only])] if only else os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(directory, name)
            kind = KIND_OF_SUFFIX.get(file.suffix.lower())
            # A link may point out of the folder, and what is not in the folder must never be shown.
            if kind is None or name.startswith(".") or not file.is_file() or not inside(root, file):
                continue
            path = file.relative_to(root).as_posix()
            stat = file.stat()
            size, changed, content = (known or {}).get(path, (None, None, ""))
            if (size, changed) != (stat.st_size, stat.st_mtime_ns):
                content = file_hash(file)
            yield Source(path, kind, content)


def root_of(folder: str | Path) -> Path:
    """Where paths start from: a folder, or that of a corpus."""
    return Path(folder).parent if Path(folder).is_file() else Path(folder)


def inside(root: str | Path, path: str | Path) -> bool:
    """Whether a path, its links followed, lies in a folder."""
    return Path(path).resolve().is_relative_to(Path(root).resolve())


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def items_of(folder: str | Path, source: Source) -> Iterator[Item]:
    """What a file holds, one after the other.

    Args:
        folder: Where the path of the source starts, or the corpus.
        source: From `list_sources`.

    Yields:
        Items; texts are cut into passages, PDF pages drawn one at a time.

    Raises:
        ValueError: If a text is too large or not UTF-8, a PDF can't be read, or a row of a corpus is no object with a
            text, an image or a video below the folder.
    """
    root = root_of(folder)
    path = str(root / source.path)
    if source.path.lower().endswith(CORPUS):
        found = _records(root, Path(path))
    elif source.kind == "text":
        found = _passages(Path(path))
    elif source.kind == "page":
        found = (Item(f"page {number}", {"image": page}) for number, page in enumerate(pdf_pages(path), 1))
    else:
        found = iter([Item("", {source.kind: path})])
    # Held back by one: only when there is no next item is it known to be the last.
    held = next(found, None)
    for item in found:
        yield held
        held = item
    if held is not None:
        yield replace(held, last=True)


def _records(root: Path, file: Path) -> Iterator[Item]:
    """Rows of a corpus: what stands under `text`, `image` and `video`, in this order of the row's own keys."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"row {number}"
            try:
                record = dict(json.loads(line))
                value = {key: record[key] for key in record if key in ("text", "image", "video") and record[key]}
            except (ValueError, TypeError) as error:
                raise ValueError(f"every row of {file} must be a JSON object, {where} is not: {error}.") from error
            media = [key for key in value if key != "text"]
            for key in media:
                value[key] = str(file.parent / str(value[key]))
                if not inside(root, value[key]):
                    raise ValueError(f"media of {file} must lie in {root}, that of {where} does not: {value[key]}.")
            if not value:
                raise ValueError(f"every row of {file} must have a text, image or video, {where} has {list(record)}.")
            kind = media[0] if media else "text"
            yield Item(where, value if media else value["text"], str(value.get("text", ""))[:PASSAGE_CHARS], kind=kind)


def _passages(path: Path) -> Iterator[Item]:
    """Passages of at most `PASSAGE_CHARS`, each with the line that it starts on."""
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"a text file must not exceed {LARGEST_TEXT} bytes, {path} has {path.stat().st_size}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text files must be UTF-8, {path} is not: {error}. Convert it, or leave it out.") from error
    start = 0
    while start < len(text):
        stop = min(start + PASSAGE_CHARS, len(text))
        if stop < len(text):
            # The last paragraph, line or blank in the window; without one (Chinese, minified code) all of it.
            for end in ("\n\n", "\n", " "):
                found = text.rfind(end, start + PASSAGE_CHARS // 2, stop)
                if found >= 0:
                    stop = found + len(end)
                    break
        passage = text[start:stop].strip()
        if passage:
            line = text.count("\n", 0, start + text[start:stop].index(passage[0])) + 1
            yield Item(f"line {line}", passage, text=passage)
        start = stop
