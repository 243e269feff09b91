"""Where annotation tables and media are found: below a local data root first, then on the hub.

The data root is an unpacked snapshot of the media repository TIGER-Lab/MMEB-V2 (folders `image-tasks`, `video-tasks`,
`visdoc-tasks`). Annotation repositories may lie below it as `<owner>/<name>` or `<name>`; what is not there is read
through `datasets.load_dataset`, unless `offline` is set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from evaluation.mmeb_v2_row import MMEBDataset

# file stems of hub repositories without a README, most specific first
_PATTERNS = "{config}/{split}-* {config}/{split} {config}/* data/{config}/{split}-* json/{config} {config}".split()
_PATTERNS_WITHOUT_CONFIG = ("data/{split}-*", "{split}-*", "{split}", "data/*")


@dataclass(frozen=True)
class DataRoot:
    """The folder that holds the data.

    Args:
        path: Folder.
        offline: Never ask the hub for an annotation table.
    """

    path: Path
    offline: bool = False

    def media(self, row: MMEBDataset, *parts: str) -> Path:
        """The first media root of `row` that has `parts`; the first root when none has (it will be reported)."""
        places = [self.path / root / Path(*parts) for root in row.media_roots]
        return next((place for place in places if place.exists()), places[0])


def read_table(row: MMEBDataset, root: DataRoot, config: str | None = None) -> Sequence[dict[str, Any]]:
    """The annotation table of a data set.

    Args:
        row: The data set.
        root: Where to look first.
        config: Hub configuration; default: the row's own.

    Returns:
        A sequence of rows (a `datasets.Dataset`, or a list for JSON files).

    Raises:
        FileNotFoundError: Nothing local, and `root.offline` is set.
    """
    config = config or row.config
    places = [
        *(root.path / hub_id for hub_id in (row.hub_id, row.alternative_id) if hub_id),
        *(root.path / hub_id.split("/")[1] for hub_id in (row.hub_id, row.alternative_id) if hub_id),
        *((root.path / row.annotation,) if row.annotation else ()),
    ]
    for place in places:
        table = _read_place(place, config, row.split)
        if table is not None:
            return table
    if root.offline:
        raise FileNotFoundError(
            f"{row.name} needs the table {row.hub_id} (config {config}, split {row.split}); tried "
            f"{[str(place) for place in places]}. Put a snapshot of it at one of these, or allow the hub."
        )
    return load_dataset(row.hub_id, config, split=row.split, revision=row.revision)


def _read_place(place: Path, config: str | None, split: str) -> Sequence[dict[str, Any]] | None:
    """The table at a file or folder, `None` when it is not there."""
    if place.is_file():
        return _read_files([place])
    if not place.is_dir():
        return None
    if (place / "README.md").is_file() and "configs:" in (place / "README.md").read_text(encoding="utf-8"):
        return load_dataset(str(place), config, split=split)
    for pattern in _PATTERNS if config else _PATTERNS_WITHOUT_CONFIG:
        stem = pattern.format(config=config, split=split)
        for suffix in (".parquet", ".jsonl", ".json"):
            files = sorted(place.glob(stem + suffix))
            if files:
                return _read_files(files)
    return None


def _read_files(files: list[Path]) -> Sequence[dict[str, Any]]:
    if files[0].suffix == ".parquet":
        return load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    rows: list[dict[str, Any]] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        # read by json, not by datasets: ids are numbers in some rows of these files and strings in others
        lines = [line for line in text.splitlines() if line.strip()]
        rows += json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in lines]
    return rows
