"""An index that follows a folder: what is new or changed is embedded, what is gone is removed, the rest is left alone.

Rows are written some hundred at a time, each time in one step, and every row knows how many its file has. So a run
that is killed has lost nothing but the rows of its last step: started again, it goes on with the parts that are
missing. One process writes at a time (a lock that ends with its process); readers need no lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from evaluation.atomic_write import atomic_write
from evaluation.embedding.fingerprint import fingerprint
from recipes.data.corpus_records import would_list
from recipes.data.searches import NOT_FINITE
from recipes.search.folder import Item, LeftOut, Source, items_of, list_sources, need_folder
from recipes.search.store import LanceStore, Store
from st_btok import checked_inputs, encode_checked

INDEX_ABOVE = 100_000
_SETTINGS = "search.json"
_BATCHES_AT_ONCE = 8  # enough to sort by length in, little enough to lose


@dataclass
class Report:
    """What a run did.

    Attributes:
        new: Files; so are `changed`, `deleted` and `unchanged`.
        left_out: Reasons by path and place.
        suffixes: Numbers of files that can't be searched, by suffix.
        recall: Of the approximate index, if there is one: the share of the ten nearest rows that it finds.
        written: Paths of the files that rows were written of.
    """

    new: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    suffixes: Counter[str] = field(default_factory=Counter)
    recall: float | None = None
    written: set[str] = field(default_factory=set)


def open_index(
    to: str | Path, model: SentenceTransformer, folder: str | Path | None = None, half: bool = False
) -> tuple[Store, Path]:
    """Open an index, or make one, after a check that it belongs to the model.

    Args:
        to: Folder of the index.
        model: The model that embeds queries and files.
        folder: The folder, or table, that is indexed; needed for a new index.
        half: For a new index: store float16.

    Returns:
        The store, and the folder that the paths in it start from.

    Raises:
        ValueError: If there is no index and no `folder`, the index was made with another model or folder, or the
            folder is not there or holds the index, whose files would be indexed too.
    """
    if folder is not None:
        need_folder(folder)
        if would_list(Path(folder), Path(to)):
            raise ValueError(
                f"an index must not lie in the folder that is indexed, or its own files would be found; {to} lies in "
                f"{folder}. Index to another folder, or to a hidden one, such as {Path(folder) / '.index'}."
            )
    path = Path(to) / _SETTINGS
    identity = fingerprint(model)
    if not path.exists():
        if folder is None:
            raise ValueError(f"{to} holds no index. Make one: python -m recipes.search index FOLDER --to {to}")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = np.asarray(model.encode_query(["a"], show_progress_bar=False))
        settings = {
            "folder": str(Path(folder).resolve()),
            "model": identity,
            "dimension": int(probe.shape[1]),
            "half": half,
        }
        atomic_write(path, json.dumps(settings, indent=2))
    settings = json.loads(path.read_text())
    if settings["model"] != identity:
        raise ValueError(
            f"the index in {to} was made with another model (fingerprint {settings['model'][:12]}..., now "
            f"{identity[:12]}...): its vectors can't be compared with this one's. Index into another folder."
        )
    if folder is not None and Path(folder).resolve() != Path(settings["folder"]):
        raise ValueError(f"the index in {to} is of {settings['folder']}, not of {folder}. Index into another folder.")
    return LanceStore(str(Path(to) / "lance"), settings["dimension"], settings["half"]), Path(settings["folder"])


def update(
    store: Store,
    model: SentenceTransformer,
    folder: str | Path,
    *,
    batch_size: int = 32,
    index_above: int = INDEX_ABOVE,
    progress: bool = True,
) -> Report:
    """Bring an index up to date with its folder.

    Args:
        store: From `open_index`.
        model: The same model as ever.
        folder: The folder.
        batch_size: Items in a forward pass.
        index_above: Rows above which searches go through an index instead of all rows.
        progress: Whether to show a progress bar over files.

    Returns:
        What was done.

    Raises:
        ValueError: If the folder is not there, can't be read, or holds nothing, though the index is not empty.
    """
    stored = store.files()
    known = {path: (entry["size"], entry["changed"], entry["content"]) for path, entry in stored.items()}
    left_out = LeftOut()
    sources = list(list_sources(folder, known, left_out))
    report = Report(left_out=left_out.reasons, suffixes=left_out.suffixes)
    # What can't be read today, such as a folder of another machine, is not gone.
    hidden = tuple(left_out.reasons)
    gone = sorted(stored.keys() - {source.path for source in sources} - set(hidden))
    gone = [path for path in gone if not path.startswith(tuple(f"{place}/" for place in hidden))]
    if gone and not sources:  # an empty mount point looks so
        raise ValueError(
            f"{folder} holds nothing that can be searched, the index {len(stored)} files of it; none was removed. "
            "Check its disk. If all of it is meant to go, delete the index."
        )
    stale = [s.path for s in sources if s.path in stored and stored[s.path]["content"] != s.content]
    store.remove([*gone, *stale])
    report.deleted, report.changed = len(gone), len(stale)
    waiting: list[tuple[Source, int, Item]] = []
    weight = 0
    for source in tqdm(sources, desc="files", unit="file", disable=not progress):
        entry = None if source.path in stale else stored.get(source.path)
        if entry is not None and entry["whole"]:
            report.unchanged += 1
            continue
        have = entry["found"] if entry is not None else set()
        try:
            for part, item in enumerate(items_of(folder, source)):
                if item.reason:
                    report.left_out[f"{source.path}, {item.place}"] = item.reason
                    continue
                if part in have:
                    continue
                waiting.append((source, part, item))
                weight += 4 if source.kind == "page" else 1  # a drawn page is megabytes
                if weight >= _BATCHES_AT_ONCE * batch_size:
                    _write(waiting, store, model, batch_size, report)
                    waiting, weight = [], 0
        except (OSError, ValueError) as error:
            report.left_out[source.path] = str(error)
    _write(waiting, store, model, batch_size, report)
    report.new = len(report.written - stored.keys())
    report.left_out = dict(sorted(report.left_out.items()))
    report.recall = store.finish(index_above)
    return report


def _write(
    waiting: list[tuple[Source, int, Item]],
    store: Store,
    model: SentenceTransformer,
    batch_size: int,
    report: Report,
) -> None:
    """Embed what waits and store it in one step; what can't be embedded is reported, and tried again next time."""
    values = [item.value for _, _, item in waiting]
    result = encode_checked(model, values, "skip", task="document", batch_size=batch_size, show_progress_bar=False)
    for bad in result.skipped:
        source, _, item = waiting[bad.row]
        report.left_out[f"{source.path}, {item.place}" if item.place else source.path] = bad.reason
    if not result.rows:
        return
    vectors = np.asarray(result.embeddings, dtype=np.float32)
    rows, kept = [], []
    for place, number in enumerate(result.rows):
        source, part, item = waiting[number]
        if not np.isfinite(vectors[place]).all():
            report.left_out[f"{source.path}, {item.place}" if item.place else source.path] = NOT_FINITE
            continue
        kept.append(place)
        report.written.add(source.path)
        identity = hashlib.sha256(f"{source.path}\0{source.content}\0{part}".encode()).hexdigest()[:32]
        rows.append(
            {
                "id": identity,
                "path": source.path,
                "kind": item.kind or source.kind,
                "place": item.place,
                "text": item.text,
                "content": source.content,
                "part": part,
                "last": int(item.last),
                "size": source.size,
                "changed": source.changed,
                "thumbnail": thumbnail(item.value, model),
            }
        )
    if rows:
        store.add(rows, vectors[kept])


def frames_of(value: Any, model: SentenceTransformer, max_pixels: int) -> list[Image.Image]:
    """The picture of an input of `items_of`, or the frames of its video; of several media the first.

    An empty list for a text, and for a file that has changed and can't be read any more.
    """
    if value.keys() <= {"text"}:
        return []
    # Through the checked reader, which bounds what a hostile file can cost; the first time was for the model.
    found = checked_inputs([value], model, "skip", max_pixels=max_pixels).inputs
    medium = next((found[0][kind] for kind in ("image", "video") if kind in found[0]), None) if found else None
    if isinstance(medium, list) and isinstance(medium[0], Image.Image | dict):
        medium = medium[0]
    if isinstance(medium, dict):  # a video with its metadata
        medium = medium["array"]
    if medium is None or isinstance(medium, Image.Image):
        return [medium] if medium is not None else []
    return [Image.fromarray(np.asarray(frame)) for frame in medium]


def thumbnail(value: Any, model: SentenceTransformer, longest: int = 256) -> bytes:
    """A small JPEG of the picture that the model read, or of the middle frame of a video; no bytes for a text."""
    frames = frames_of(value, model, 4 * longest**2)
    if not frames:
        return b""
    picture = frames[len(frames) // 2].convert("RGB")
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


@contextmanager
def one_writer(to: str | Path) -> Iterator[None]:
    """Hold the index for writing; the lock ends with the process, however it ends.

    Raises:
        ValueError: If another process writes.
    """
    Path(to).mkdir(parents=True, exist_ok=True)
    with (Path(to) / ".writer").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to the index in {to}. Wait for it, or stop it.") from error
        yield
