"""A user's own pairs: a folder written by `datasets`, JSONL, JSON, CSV or parquet files, or a data set on the hub.

For each side (`query`, `positive`, optionally `negative` or `negative_1`, `negative_2`, ...) a row gives its text, its
image, its video, or several of them:

| column | holds |
|---|---|
| `query` | text; or an image (an image column of `datasets`); or a struct of `text`, `image`, `video` |
| `query_text` | text |
| `query_image` | an image column, or the path of an image |
| `query_video` | a video column, the path of a video file, a folder of frames, or a list of frame paths |

The names that the hub's pairs for sentence-transformers have stand for these: `anchor` and `question` for `query`,
`answer` and `document` for `positive`.

Paths are relative to the folder of the data file. A folder of frames shows eight of them, evenly spread.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch import nn

from evaluation.media import stored_frames
from evaluation.mmeb_v2.video import choose_frames
from recipes.data.training_pairs import VIDEO_SUFFIXES, BrokenRowError, Side, Source, check_source

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_USUAL = {"anchor": "query", "question": "query", "answer": "positive", "document": "positive"}
_OTHERS = re.compile(rf"^({'|'.join(_USUAL)})(?=(_(text|image|video))?$)")
_COLUMN = re.compile(r"(query|positive|negative(?:_\d+)?)(?:_(?:text|image|video))?")


def load_user_data(paths: Sequence[str], weights: Sequence[float] = (), **check: Any) -> list[Source]:
    """Load data sets of the user.

    Args:
        paths: Files, folders or hub names; each is a source of its own.
        weights: Shares in the mix, one per path. Default: the number of rows.
        **check: For `check_source`: `on_error`, `check_media`, `num_proc`, `recheck`, `target`.

    Returns:
        The checked sources.

    Raises:
        ValueError: Another number of weights than paths, missing columns, or what `check_source` raises.
    """
    if weights and len(weights) != len(paths):
        raise ValueError(f"weights must have one value per data set, got {len(weights)} for {len(paths)}.")
    sources: list[Source] = []
    for number, path in enumerate(paths):
        table, folder = _read(path)
        table = table.rename_columns(usual_names(table.column_names))
        sides = sides_of(table.column_names, path)
        name = re.sub(r"\W+", "-", Path(path).stem if Path(path).exists() else path).strip("-")
        if hasattr(nn.Sequential, name):  # where the Trainer keeps losses by name: `train` would be a method of it
            name = f"{name}-data"
        if any(source.name == name for source in sources):
            name = f"{name}-{number}"
        read = partial(read_pair, sides=sides, folder=str(folder))
        source = check_source(name, table, read, sides, hub_id="" if Path(path).exists() else path, **check)
        sources.append(replace(source, weight=weights[number] if weights else float(len(source.pairs))))
    return sources


def _read(path: str) -> tuple[Dataset, Path]:
    """The table and the folder that its paths start from."""
    place = Path(path)
    if place.is_file():
        if place.suffix not in _LOADERS:
            raise ValueError(f"a data file must be one of {sorted(_LOADERS)}, got {path!r}.")
        return load_dataset(_LOADERS[place.suffix], data_files=str(place), split="train"), place.parent
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        saved = load_from_disk(path)
        return (saved["train"] if isinstance(saved, DatasetDict) else saved), place
    return load_dataset(path, split="train"), place


def usual_names(columns: Sequence[str]) -> dict[str, str]:
    """Our name for every column that goes by another one; where two would become one, both stay as they are."""
    names = {column: _OTHERS.sub(lambda match: _USUAL[match[0]], column) for column in columns}
    taken = Counter(names.values())
    return {column: name if taken[name] == 1 else column for column, name in names.items()}


def sides_of(columns: Sequence[str], path: str) -> tuple[str, ...]:
    """The sides that columns stand for; raises `ValueError` if query or positive is missing."""
    named = [match.group(1) for column in columns if (match := _COLUMN.fullmatch(column))]
    sides = tuple(dict.fromkeys(named))
    if not {"query", "positive"} <= set(sides):
        raise ValueError(
            f"{path} must have the columns query and positive (or query_text, query_image, query_video, ...), but has "
            f"{list(columns)}. Rename them, e.g. with Dataset.rename_columns."
        )
    return ("query", "positive", *sorted(set(sides) - {"query", "positive"}))


def read_pair(record: Mapping[str, Any], sides: Sequence[str], folder: str) -> dict[str, Side]:
    """One row as sides; a negative that is empty in this row is left out."""
    found = {side: _side(record, side, Path(folder)) for side in sides}
    return {side: value for side, value in found.items() if value != Side() or not side.startswith("negative")}


def _side(record: Mapping[str, Any], side: str, folder: Path) -> Side:
    own = record.get(side)
    parts = {kind: record.get(f"{side}_{kind}") for kind in ("text", "image", "video")}
    columns = {"image": f"{side}_image"}
    if isinstance(own, str):
        parts["text"] = own
    elif isinstance(own, Mapping) and "bytes" in own:
        parts["image"], columns["image"] = own, side
    elif isinstance(own, Mapping):
        parts.update({kind: value for kind, value in own.items() if kind in parts})
    elif own is not None:
        raise BrokenRowError(f"column {side} must hold text, an image or a struct of them, got {type(own).__name__}")
    text, image = parts["text"] or "", parts["image"]
    path, column = "", ""
    if isinstance(image, Mapping) and isinstance(record.get(columns["image"]), Mapping):
        column = columns["image"]
    elif image:
        if not isinstance(image, str):
            raise BrokenRowError(f"{side}: an image inside a struct must be a path; use a column {side}_image")
        path = str(folder / image)
    return Side(str(text), path, _video(parts["video"], folder), column)


def _video(value: Any, folder: Path) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = value["path"]  # a video column of `datasets`, undecoded
    if not value:
        return ()
    if isinstance(value, str):
        place = folder / value
        return (str(place),) if place.suffix.lower() in VIDEO_SUFFIXES else choose_frames(stored_frames(place))
    return tuple(str(folder / frame) for frame in value)
