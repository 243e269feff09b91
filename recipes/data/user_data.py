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
`answer` and `document` for `positive`. Other columns are not used, which is logged. A row that gives a side's text,
image or video twice (`query` beside `query_text`), or its positive as a negative, is a broken row.

Digits and dates are texts. Paths are relative to the folder of the data file. A folder of frames shows eight of them,
evenly spread.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import os
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

logger = logging.getLogger(__name__)

# A row of a text table on its way through `datasets`, which would make up a type for every column otherwise.
PACKED = Features({"record": Value("string"), "columns": Value("string"), "problem": Value("string")})
_USUAL = {"anchor": "query", "question": "query", "answer": "positive", "document": "positive"}
_OTHERS = re.compile(rf"^({'|'.join(_USUAL)})(?=(_(text|image|video))?$)")
_KEYS = ("text", "image", "video", "bytes", "path")  # of a struct: parts of a side, or a stored file
_JUDGED = ("label", "labels", "score", "scores", "similarity")
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
            table = table.rename_columns({column: names[column] for column in table.column_names})
        read = partial(read_pair, sides=sides, folder=str(folder), names=names)
        source = check_source(name, table, read, sides, hub_id="" if Path(path).exists() else path, **check)
        warn_of_paths(source, str(folder))
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
            return table, with_keys(table.features), place.parent
        known = f"a data file must be one of {', '.join(SUFFIXES)}, got {path!r}. Save it as one of them."
        raise ValueError(known if place.is_file() else f"there is no file or folder {path!r}. Check the path.")
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        saved = load_from_disk(path)
        table = saved["train"] if isinstance(saved, DatasetDict) else saved
    else:
        table = load_named(path, path)
    return table, with_keys(table.features), place


def with_keys(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row, or of a table's features, and of structs each key that holds nothing of a side."""
    keys = [
        f"{column}.{key}"
        for column, value in row.items()
        if isinstance(value, Mapping) and _COLUMN.fullmatch(_OTHERS.sub(lambda match: _USUAL[match[0]], column))
        for key in value
        if key not in _KEYS
    ]
    return [*row, *keys]


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
    code = inspect.getsource(tables) + inspect.getsource(packed_rows)
    table = Dataset.from_generator(
        packed_rows,
        features=PACKED,
        gen_kwargs={
            "paths": [str(path.resolve())],
            "version": f"{facts.st_size} {facts.st_mtime_ns} {Hasher.hash(code)}",
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
            problem, record = (str(row), {}) if isinstance(row, BrokenRecordError) else ("", row)
            yield {"record": json.dumps(record), "columns": json.dumps(with_keys(record)), "problem": problem}


def unpacked(record: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """A row of a table, packed or not, under our columns' names.

    Those are `names`, and for columns of a packed row that stand in later rows only, or without `names`, the
    `usual_names` of the row.

    Raises:
        BrokenRowError: If it could not be read.
    """
    found = dict(names or {})
    if is_packed := record.keys() >= PACKED.keys():
        if record["problem"]:
            raise BrokenRowError(record["problem"])
        record = json.loads(record["record"])
    if is_packed or names is None:
        found = usual_names(list(record)) | found
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
    warn_of_unused([column for column, name in names.items() if not _COLUMN.fullmatch(name)], path)
    return ("query", "positive", *sorted(set(sides) - {"query", "positive"}))


def warn_of_unused(columns: Sequence[str], path: str) -> None:
    """Say which columns are passed over, what a mistyped one may mean, and that every row counts as a right pair."""
    if not columns:
        return
    own = [f"{side}{kind}" for side in ("query", "positive", "negative") for kind in ("", "_text", "_image", "_video")]
    near = {column: difflib.get_close_matches(column.replace(".", "_"), own, 1, 0.7) for column in columns}
    meant = ", ".join(f"{found[0]} for {column}" for column, found in near.items() if found)
    judged = [column for column in columns if column.lower() in _JUDGED]
    logger.warning(
        "%s: the columns %s are not used%s%s",
        path,
        ", ".join(columns),
        f". Rename them if they are sides: {meant}" if meant else "",
        f". {judged[0]} decides nothing: every row trains as a right pair, so take wrong ones out" if judged else "",
    )


def warn_of_paths(source: Source, folder: str) -> None:
    """Say that a side whose every text names a file beside the data is taken for texts, not for these files."""
    for side in source.pairs.column_names:
        texts = (row["text"] for row in source.pairs[side] if not row["digest"])
        first = next(texts, "")
        if first and all(os.path.isfile(Path(folder, text)) for text in (first, *texts)):
            logger.warning(
                "%s: every text of %s is the name of a file, such as %r, and the names themselves train. Call the "
                "column %s_image (or %s_video) to train on the files",
                source.name,
                side,
                first,
                side,
                side,
            )


def read_pair(
    record: Mapping[str, Any], sides: Sequence[str], folder: str, names: Mapping[str, str] | None = None
) -> dict[str, Side]:
    """One row as sides; a negative that is empty in this row is left out.

    Paths start from `folder`, or from a `folder` that the row of a text table names itself.
    """
    if record.keys() >= PACKED.keys():
        folder = record.get("folder", folder)
    record = unpacked(record, names or {})
    found = {side: _side(record, side, Path(folder)) for side in sides}
    right = _content(found["positive"], record)
    for side, value in found.items():
        if side.startswith("negative") and value != Side() and _content(value, record) == right:
            raise BrokenRowError(f"{side} is the row's own positive, which it would push away. Take it out")
    return {side: value for side, value in found.items() if value != Side() or not side.startswith("negative")}


def _content(side: Side, record: Mapping[str, Any]) -> tuple[Any, ...]:
    return side.text.strip(), side.image, side.video, (record[side.column] or {}).get("bytes") if side.column else None


def _side(record: Mapping[str, Any], side: str, folder: Path) -> Side:
    parts, column = _parts(record, side)
    text, image = parts["text"] or "", parts["image"]
    if not isinstance(text, str):
        raise BrokenRowError(f"{side}: a text must be a string, got {type(text).__name__}")
    if isinstance(image, Mapping) and image.get("path") and not image.get("bytes"):
        image = image["path"]  # of a file that was not taken into the table
    video = _video(side, parts["video"], folder)
    if isinstance(image, Mapping) and isinstance(record.get(column), Mapping):
        return Side(text, "", video, column)
    if image and not isinstance(image, str):
        if isinstance(image, list):
            raise BrokenRowError(
                f"{side}: an image must be one path, got {len(image)} in a list. Write a row for each"
            )
        raise BrokenRowError(f"{side}: an image inside a struct must be a path; use a column {side}_image")
    return Side(text, str(folder / image) if image else "", video)


def _parts(record: Mapping[str, Any], side: str) -> tuple[dict[str, Any], str]:
    """Text, image and video of a side, and the column that the image stands in."""
    try:
        own, text = as_text(record.get(side)), as_text(record.get(f"{side}_text"))
    except BrokenRecordError as error:
        raise BrokenRowError(f"{side}: {error}") from None
    parts = {"text": text, "image": record.get(f"{side}_image"), "video": record.get(f"{side}_video")}
    column = f"{side}_image"
    given: dict[str, Any] = {}
    if isinstance(own, str):
        given = {"text": own}
    elif isinstance(own, Mapping) and "bytes" in own:
        given = {"image": own}
        column = side if _is_there(own) else column
    elif isinstance(own, Mapping):
        given = {kind: value for kind, value in own.items() if kind in parts}
    elif own is not None:
        raise BrokenRowError(f"column {side} must hold text, an image or a struct of them, got {type(own).__name__}")
    for kind, value in given.items():
        if _is_there(value) and _is_there(parts[kind]):
            raise BrokenRowError(
                f"{side}: its {kind} is given twice, by the columns {side} and {side}_{kind}. Keep one of them"
            )
        parts[kind] = value if _is_there(value) else parts[kind]
    return parts, column


def _is_there(value: Any) -> bool:
    """Whether a cell holds something; a stored file without bytes and path does not."""
    return any(value.get(key) for key in ("bytes", "path")) if isinstance(value, Mapping) else bool(value)


def _video(side: str, value: Any, folder: Path) -> tuple[str, ...]:
    if isinstance(value, Mapping):  # a video column of `datasets`, undecoded
        value = value.get("path") or value.get("bytes")
    if isinstance(value, bytes):
        raise BrokenRowError(
            f"{side}: a video must be a path, got {len(value)} bytes. Write them to a file and name it in {side}_video"
        )
    if not value:
        return ()
    if isinstance(value, str):
        place = folder / value
        return choose_frames(stored_frames(place)) if place.is_dir() else (str(place),)
    return tuple(str(folder / frame) for frame in value)
