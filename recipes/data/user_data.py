"""A user's own pairs: a table, a folder written by `datasets`, or a data set on the hub.

Tables are `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet`, read as `tables.py` says: a row that can't be read is a
broken row, with its file, line and remedy.

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

Digits and dates are texts. Paths are relative to the folder of the data file. A folder of frames shows eight of them,
evenly spread.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets.exceptions
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from datasets.fingerprint import Hasher
from torch import nn

from evaluation.media import choose_frames, stored_frames
from recipes.data import tables
from recipes.data.tables import SUFFIXES, TEXT_SUFFIXES, BrokenRecordError, as_text, read_table
from recipes.data.training_pairs import BrokenRowError, Side, Source, check_source

# A row of a text table on its way through `datasets`, which would make up a type for every column otherwise.
PACKED = Features({"record": Value("string"), "columns": Value("string"), "problem": Value("string")})
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
        table, columns, folder = _read(path)
        names = usual_names(columns)
        sides = sides_of(names, path)
        name = re.sub(r"\W+", "-", Path(path).stem if Path(path).exists() else path).strip("-")
        if hasattr(nn.Sequential, name):  # where the Trainer keeps losses by name: `train` would be a method of it
            name = f"{name}-data"
        if any(source.name == name for source in sources):
            name = f"{name}-{number}"
        if table.features != PACKED:
            table = table.rename_columns(names)
        read = partial(read_pair, sides=sides, folder=str(folder), names=names)
        source = check_source(name, table, read, sides, hub_id="" if Path(path).exists() else path, **check)
        sources.append(replace(source, weight=weights[number] if weights else float(len(source.pairs))))
    return sources


def _read(path: str) -> tuple[Dataset, list[str], Path]:
    """The table, its columns, and the folder that its paths start from."""
    place = Path(path)
    if is_file_name(path):
        if place.suffix.lower() in TEXT_SUFFIXES:
            return *_text_table(place), place.parent
        if place.suffix.lower() in SUFFIXES:
            tables.parquet_facts(place)
            table = load_named(str(place), "parquet", data_files=str(place))
            return table, table.column_names, place.parent
        known = f"a data file must be one of {', '.join(SUFFIXES)}, got {path!r}. Save it as one of them."
        raise ValueError(known if place.is_file() else f"there is no file or folder {path!r}. Check the path.")
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        saved = load_from_disk(path)
        table = saved["train"] if isinstance(saved, DatasetDict) else saved
    else:
        table = load_named(path, path)
    return table, table.column_names, place


def is_file_name(path: str) -> bool:
    """Whether a text names a file, there or not, and neither a folder nor a data set on the hub (`owner/name`)."""
    place = Path(path)
    return not place.is_dir() and (
        place.is_file() or place.suffix.lower() in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1
    )


def load_named(name: str, *args: Any, **options: Any) -> Any:
    """What `datasets` loads; its many errors as one that says what to look at."""
    try:
        table = load_dataset(*args, split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        if Path(name).exists():
            hint = f"Give a file of it instead ({', '.join(SUFFIXES)})"
            raise ValueError(f"{name} can't be loaded as a data set: {reason}. {hint}.") from error
        raise ValueError(
            f"there is no file or folder {name!r} here, and no data set of that name: {reason}. Check the path."
        ) from error
    for column, feature in (table.features or {}).items():
        if isinstance(feature, Value) and feature.dtype.endswith("binary") and column.endswith("_image"):
            table = table.cast_column(column, Image(decode=False))
    return table


def _text_table(path: Path) -> tuple[Dataset, list[str]]:
    """Rows as JSON, as every row may have other types; kept by `datasets` until the file changes."""
    if next(read_table(path), None) is None:
        raise ValueError(f"the file {str(path)!r} has no rows. Write some, or leave it out.")
    facts = path.stat()
    table = Dataset.from_generator(
        packed_rows,
        features=PACKED,
        gen_kwargs={
            "paths": [str(path.resolve())],
            "version": f"{facts.st_size} {facts.st_mtime_ns} {Hasher.hash(inspect.getsource(tables))}",
        },
    )
    columns = [column for names in table.unique("columns") for column in json.loads(names)]
    if not columns:
        reasons = table.filter(bool, input_columns="problem", load_from_cache_file=False)["problem"][:1]
        raise ValueError(f"{path} has no row that can be read: {next(iter(reasons), 'all are empty')}.")
    return table, list(dict.fromkeys(columns))


def packed_rows(paths: Sequence[str], version: str = "") -> Iterator[dict[str, str]]:
    """Rows of text tables in one form: `record` and `columns` as JSON, or the `problem`.

    `version` tells `datasets`, which keeps what it read, that the files have changed.
    """
    for path in paths:
        for _, row in read_table(path):
            broken = isinstance(row, BrokenRecordError)
            record, columns = ({}, []) if broken else (row, list(row))
            problem = str(row) if broken else ""
            yield {"record": json.dumps(record), "columns": json.dumps(columns), "problem": problem}


def unpacked(record: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """A row of a table, packed or not, under our columns' names (default: `usual_names` of its own).

    Raises:
        BrokenRowError: If it could not be read.
    """
    if record.keys() == PACKED.keys():
        if record["problem"]:
            raise BrokenRowError(record["problem"])
        record = json.loads(record["record"])
    found = usual_names(list(record)) if names is None else names
    return {found.get(column, column): value for column, value in record.items()}


def usual_names(columns: Sequence[str]) -> dict[str, str]:
    """Our name for every column that goes by another one; where two would become one, both stay as they are."""
    names = {column: _OTHERS.sub(lambda match: _USUAL[match[0]], column) for column in columns}
    taken = Counter(names.values())
    return {column: name if taken[name] == 1 else column for column, name in names.items()}


def sides_of(names: Mapping[str, str], path: str) -> tuple[str, ...]:
    """The sides that columns stand for.

    Args:
        names: From `usual_names`: our name of each column.
        path: Where they are.

    Returns:
        `query`, `positive`, and those of negatives.

    Raises:
        ValueError: If query or positive is missing.
    """
    named = [match.group(1) for column in names.values() if (match := _COLUMN.fullmatch(column))]
    sides = tuple(dict.fromkeys(named))
    missing = [side for side in ("query", "positive") if side not in sides]
    if missing:
        others = [column for column, name in names.items() if not _COLUMN.fullmatch(name)]
        kind = next((kind for kind in ("image", "video") if others and kind in others[0]), "")
        example = f", such as {others[0]} to {missing[0]}{'_' * bool(kind)}{kind}" if others else ""
        raise ValueError(
            f"{path} must have the columns query and positive (or query_text, query_image, query_video, ...), but has "
            f"{list(names)}. Rename its columns{example}."
        )
    return ("query", "positive", *sorted(set(sides) - {"query", "positive"}))


def read_pair(
    record: Mapping[str, Any], sides: Sequence[str], folder: str, names: Mapping[str, str] | None = None
) -> dict[str, Side]:
    """One row as sides; a negative that is empty in this row is left out."""
    record = unpacked(record, names or {})
    found = {side: _side(record, side, Path(folder)) for side in sides}
    return {side: value for side, value in found.items() if value != Side() or not side.startswith("negative")}


def _side(record: Mapping[str, Any], side: str, folder: Path) -> Side:
    try:
        own, text = as_text(record.get(side)), as_text(record.get(f"{side}_text"))
    except BrokenRecordError as error:
        raise BrokenRowError(f"{side}: {error}") from None
    parts = {"text": text, "image": record.get(f"{side}_image"), "video": record.get(f"{side}_video")}
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
    if not isinstance(text, str):
        raise BrokenRowError(f"{side}: a text must be a string, got {type(text).__name__}")
    path, column = "", ""
    if isinstance(image, Mapping) and isinstance(record.get(columns["image"]), Mapping):
        column = columns["image"]
    elif image:
        if not isinstance(image, str):
            raise BrokenRowError(f"{side}: an image inside a struct must be a path; use a column {side}_image")
        path = str(folder / image)
    return Side(text, path, _video(parts["video"], folder), column)


def _video(value: Any, folder: Path) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = value["path"]  # a video column of `datasets`, undecoded
    if not value:
        return ()
    if isinstance(value, str):
        place = folder / value
        return choose_frames(stored_frames(place)) if place.is_dir() else (str(place),)
    return tuple(str(folder / frame) for frame in value)
