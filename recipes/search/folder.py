"""Files of a folder, and the items in them: what one row of the index stands for.

A text file becomes passages, a PDF its pages, a table (`.jsonl`, `.parquet`) its rows, an image or a video one item
each. Nothing is opened before an item is asked for, so that a folder of a million files can be listed at once. In the
place of a folder stands a table alone (`.csv` and `.json` too), whose media lie in its folder. What can't be an item
is said, never passed over: files of other kinds by their suffix, unreadable files, pages and rows by their reason.
"""

from __future__ import annotations

import hashlib
import itertools
import mimetypes
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from recipes.data.corpus import as_input
from recipes.data.corpus_digest import CorpusDigest
from recipes.data.corpus_records import ADDRESSES, files_in
from recipes.data.tables import SUFFIXES, BrokenRecordError, read_table
from st_btok import pdf_pages

KINDS = ("text", "image", "page", "video")
TABLES = (".jsonl", ".parquet")
_HTML = (".html", ".htm", ".xhtml")
# Beside what `mimetypes` knows, which differs between machines.
_SUFFIXES = {
    "text": "txt md rst tex log csv tsv json yaml yml toml ini cfg xml html htm xhtml srt vtt py ipynb js jsx tsx css "
    "c h cc cpp hpp java kt go rs rb php sh sql r m swift",
    "image": "png jpg jpeg jpe jfif webp bmp dib gif tif tiff avif avifs heic heif psd tga ico icns jp2 j2k jpx ppm "
    "pgm pbm pnm pcx dds qoi sgi xbm xpm apng",
    "page": "pdf",
    "video": "mp4 m4v mov webm mkv avi mts m2ts mpg mpeg wmv flv ogv 3gp vob mxf h264 h265 hevc ivf",
}
KIND_OF_SUFFIX = {f".{suffix}": kind for kind, names in _SUFFIXES.items() for suffix in names.split()}
KIND_OF_SUFFIX |= dict.fromkeys(TABLES, "text")
# About what an embedder of 256 to 512 tokens reads whole; a passage ends at a paragraph where there is one.
PASSAGE_CHARS = 1000
LARGEST_TEXT = 16 * 2**20
_AND_MEDIA = "+"  # in `Source.content`, between the hash of a table and that of the media it names
_SYNC, _PACKET = b"\x47", 188  # MPEG transport streams begin so, TypeScript does not


@dataclass(frozen=True)
class Source:
    """One file: its path below the folder (with `/`), what it is, a hash of its bytes, its size and time (ns).

    The hash of a table also covers size and time of the media that its rows name.
    """

    path: str
    kind: str
    content: str
    size: int = 0
    changed: int = 0


@dataclass(frozen=True)
class Item:
    """One row to be: where it stands in its file, what the model reads, and what a person is shown.

    Attributes:
        place: `"page 3"`, `"line 120"`, `"row 7"`; empty where the file is one item.
        value: The model's input, a dict: text, medium or both. None for an item that can't be read.
        text: What is shown of a text, at most a passage.
        last: Whether it is the last one of its file.
        kind: Where it is another than its file's: a table holds items of any kind.
        reason: Why it can't be read.
    """

    place: str
    value: Any
    text: str = ""
    last: bool = False
    kind: str = ""
    reason: str = ""


@dataclass
class LeftOut:
    """What is not in the index: numbers of files by suffix whose kind can't be searched, and reasons by path."""

    suffixes: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)


def list_sources(
    folder: str | Path, known: dict[str, tuple[int, int, str]] | None = None, left_out: LeftOut | None = None
) -> Iterator[Source]:
    """All files of a kind that can be searched, in the order of their paths; hidden files are passed over.

    Args:
        folder: Where to look, subfolders included; or a table.
        known: Size, modification time (ns) and hash by path, from an earlier run: an unchanged file is not read again.
        left_out: Filled with what can't be a source.

    Yields:
        One source per file.

    Raises:
        ValueError: If the folder, or the table, is not there or can't be read: nothing in it is known to be gone.
    """
    need_folder(folder)
    root, only = root_of(folder).resolve(), Path(folder).name if Path(folder).is_file() else None
    left_out = LeftOut() if left_out is None else left_out

    def unreadable(error: OSError) -> None:
        if Path(os.fsdecode(error.filename)) == root:
            raise ValueError(f"the folder {root} can't be read: {error.strerror}. Check its rights, and its disk.")
        left_out.reasons[shown_path(error.filename, root)] = f"the folder can't be read: {error.strerror}"

    for file in [root / only] if only else files_in(root, unreadable):
        try:
            source = _source_of(file, root, known or {}, SUFFIXES if only else TABLES)
        except OSError as error:
            left_out.reasons[shown_path(file, root)] = f"it can't be read: {error.strerror}"
        except ValueError as error:
            left_out.reasons[shown_path(file, root)] = str(error)
        else:
            if source is None:
                left_out.suffixes[file.suffix.lower()] += 1
            else:
                yield source


def need_folder(folder: str | Path) -> None:
    """Refuse a folder, or a table, that is not there, such as that of a disk that is not mounted."""
    if not Path(folder).exists():
        raise ValueError(f"there is no folder or table {str(folder)!r}. Check the path, and its disk.")


def _source_of(
    file: Path, root: Path, known: dict[str, tuple[int, int, str]], tables: tuple[str, ...]
) -> Source | None:
    """A file as a source; None if it is of no kind that can be searched."""
    kind, path = kind_of(file), file.relative_to(root).as_posix()
    if kind is None:
        return None
    if shown_path(file, root) != path:
        raise ValueError("the name is not UTF-8. Rename it, e.g. with convmv")
    # A link may point out of the folder, and what is not in the folder must never be shown.
    if not inside(root, file):
        raise ValueError("it links out of the folder. Copy it into the folder")
    stat = file.stat()
    size, changed, content = known.get(path, (None, None, ""))
    content = hash_of_bytes(content)
    if (size, changed) != (stat.st_size, stat.st_mtime_ns):
        content = file_hash(file)
    if file.suffix.lower() in tables:
        content += _media_named_by(file)
    return Source(path, kind, content, stat.st_size, stat.st_mtime_ns)


def hash_of_bytes(content: str) -> str:
    """The part of `Source.content` that is the file's own."""
    return content.partition(_AND_MEDIA)[0]


def _media_named_by(table: Path) -> str:
    """What changes with size and time of the media that a table names, as for a corpus; empty if it names none."""
    digest = CorpusDigest(table.parent)
    none = digest.value()
    try:
        if table.suffix.lower() == ".parquet":
            digest.add_media_of_parquet(table)
        else:
            for _, record in read_table(table):
                if isinstance(record, dict):
                    digest.add_media_of(record)
    except (OSError, ValueError):  # `items_of` meets it too, and says it
        return ""
    return "" if digest.value() == none else f"{_AND_MEDIA}{digest.value()}"


def kind_of(file: Path) -> str | None:
    """What a file is, by its suffix: a kind of `KINDS`, or None."""
    suffix = file.suffix.lower()
    if suffix == ".ts":  # a video's transport stream, or TypeScript
        with file.open("rb") as stream:
            start = stream.read(_PACKET + 1)
        return "video" if start[:1] == start[_PACKET:] == _SYNC else "text"
    if suffix in KIND_OF_SUFFIX:
        return KIND_OF_SUFFIX[suffix]
    kind = (mimetypes.guess_type(f"name{suffix}")[0] or "").partition("/")[0]
    return kind if kind in ("text", "video") or (kind == "image" and suffix not in (".svg", ".eps")) else None


def shown_path(path: str | bytes | Path, root: Path) -> str:
    """A path below the folder as text that can be printed and stored, whatever its bytes are."""
    name = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    below = os.path.relpath(name, root)
    return below.encode(errors="surrogateescape").decode(errors="backslashreplace")


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
        folder: Where the path of the source starts, or the table.
        source: From `list_sources`.

    Yields:
        Items; texts are cut into passages, PDF pages drawn one at a time. A page or row that can't be read has a
        `reason` and takes its place.

    Raises:
        ValueError: If the whole file can't be read: a text is too large or not UTF-8, a PDF or a table damaged.
    """
    root = root_of(folder)
    path = root / source.path
    tables = SUFFIXES if Path(folder).is_file() else TABLES
    if path.suffix.lower() in tables:
        found = _records(root, path)
    elif source.kind == "text":
        found = _passages(path)
    elif source.kind == "page":
        found = _pages(path)
    else:
        found = iter([Item("", {source.kind: str(path)})])
    # Held back by one: only when there is no next item is it known to be the last.
    held = next(found, None)
    for item in found:
        yield held
        held = item
    if held is not None:
        yield replace(held, last=True)


def _pages(path: Path) -> Iterator[Item]:
    """Pages of a PDF, counted from 1; one that can't be drawn gives its reason, and the next one follows."""
    pages = pdf_pages(path)
    for number in itertools.count(1):
        place = f"page {number}"
        try:
            yield Item(place, {"image": next(pages)})
        except StopIteration:
            return
        except ValueError as error:
            yield Item(place, None, reason=str(error))


def _records(root: Path, file: Path) -> Iterator[Item]:
    """Rows of a table: what stands under `text`, `image` and `video`, in this order of the row's own keys."""
    for number, record in read_table(file):
        where = f"row {number}"
        try:
            value = as_input(record, file.parent)
            for key in value:
                for medium in value[key] if isinstance(value[key], list) else [value[key]]:
                    is_path = key != "text" and isinstance(medium, str) and not medium.startswith(ADDRESSES)
                    if is_path and not inside(root, medium):
                        raise BrokenRecordError(f"media of {file.name} must lie below its folder, {medium} does not")
        except BrokenRecordError as error:
            yield Item(where, None, reason=str(error))
            continue
        kind = next((key for key in value if key != "text"), "text")
        yield Item(where, value, str(value.get("text", ""))[:PASSAGE_CHARS], kind=kind)


def _passages(path: Path) -> Iterator[Item]:
    """Passages of at most `PASSAGE_CHARS`, each with the line that it starts on."""
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"a text file must not exceed {LARGEST_TEXT} bytes, {path} has {path.stat().st_size}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text files must be UTF-8, {path} is not: {error}. Convert it, or leave it out.") from error
    if path.suffix.lower() in _HTML:
        text = _words_of_html(text)
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
            yield Item(f"line {line}", {"text": passage}, text=passage)
        start = stop


class _Words(HTMLParser):
    """What a browser shows of HTML, each word on the line that it has in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = [""]
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in ("script", "style", "template")
        self._write(" ")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(self._silent - (tag in ("script", "style", "template")), 0)
        self._write(" ")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._write(data)

    def _write(self, data: str) -> None:
        line = self.getpos()[0]
        for offset, part in enumerate(data.split("\n")):
            self.lines += [""] * (line + offset - len(self.lines))
            self.lines[line + offset - 1] += part


def _words_of_html(text: str) -> str:
    parser = _Words()
    parser.feed(text)
    parser.close()
    return "\n".join(" ".join(line.split()) for line in parser.lines)
