"""Where annotation tables and media are found: below a local data root first, then on the hub.

The data root is an unpacked snapshot of the media repository TIGER-Lab/MMEB-V2 (folders `image-tasks`, `video-tasks`,
`visdoc-tasks`). Annotation repositories may lie below it as `<owner>/<name>` or `<name>`; what is not there is read
through `datasets.load_dataset`, unless `offline` is set.

No source we know records which commits of these repositories the published scores were measured on. So what is read is
written down instead: the hub commit, or for local files without one a hash of the files, goes into every result
(`DataRoot.read`). Pin a commit with a row's `revision`, or `--revision NAME=COMMIT`; other data are then refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import config as datasets_config
from datasets import load_dataset
from huggingface_hub import HfApi

from evaluation.dataset import MMEBDataset

# file stems of hub repositories without a README, most specific first
_PATTERNS = "{config}/{split}-* {config}/{split} {config}/* data/{config}/{split}-* json/{config} {config}".split()
UNKNOWN = "unknown commit"
_END_BYTES = 2**16  # corpora hold gigabytes of pictures; a parquet file's end describes all of its columns
_PATTERNS_WITHOUT_CONFIG = ("data/{split}-*", "{split}-*", "{split}", "data/*")
# at the start of a file's name
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z0-9])", re.IGNORECASE)
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


@dataclass(frozen=True)
class DataRoot:
    """The folder that holds the data.

    Args:
        path: Folder.
        offline: Never ask the hub for an annotation table.
        read: What was read so far, filled by `read_table`: hub id -> its commit, or `files <hash>`.
    """

    path: Path
    offline: bool = False
    read: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

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
        ValueError: The row is pinned to a revision and the data are of another; a shard is missing; or the data set's
            other tables were read from another copy.
    """
    config = config or row.config
    repositories = [hub_id for hub_id in (row.hub_id, row.alternative_id) if hub_id]
    places = [
        *((hub_id, root.path / hub_id) for hub_id in repositories),
        *((hub_id, root.path / hub_id.split("/")[1]) for hub_id in repositories),
        *(((row.hub_id, root.path / row.annotation),) if row.annotation else ()),
    ]
    for hub_id, place in places:
        version = local_version(place) if place.exists() else ""
        table = _read_place(place, config, row.split, version)
        if table is not None:
            _record(root, row, hub_id, version)
            return table
    if root.offline:
        raise FileNotFoundError(
            f"{row.name} needs the table {row.hub_id} (config {config}, split {row.split}); tried "
            f"{[str(place) for _, place in places]}. Put a snapshot of it at one of these, or allow the hub."
        )
    commit = row.revision or _newest_commit(row.hub_id)
    _record(root, row, row.hub_id, commit or UNKNOWN)
    return load_dataset(row.hub_id, config, split=row.split, revision=commit)


def _newest_commit(hub_id: str) -> str | None:
    """The commit that the hub serves now; asked first, so that what is loaded is what is recorded."""
    try:
        return HfApi().dataset_info(hub_id).sha
    except ConnectionError:  # `datasets` may still hold a copy, but does not say of which commit
        return None


def _record(root: DataRoot, row: MMEBDataset, hub_id: str, version: str) -> None:
    if row.revision and version != row.revision:
        raise ValueError(
            f"{row.name} is pinned to revision {row.revision}, but the data of {hub_id} at hand are of {version}. "
            "Download that revision (`hf download --repo-type dataset --revision`), or unpin it."
        )
    known = root.read.setdefault(hub_id, version)
    if known != version:
        raise ValueError(
            f"{row.name} needs all tables of {hub_id} from one copy, but some are of {known} and others of {version}. "
            "Complete one copy, or remove the other."
        )


def local_version(place: Path) -> str:
    """Which version of a repository a local file or folder holds.

    Args:
        place: A hub snapshot as the hub's own tools leave it, or any other file or folder.

    Returns:
        The commit, where the hub's cache (`snapshots/<commit>`) or `hf download --local-dir` recorded one for every
        file; else `files <hash>` of the names, the sizes and both ends (64 KiB) of the files.
    """
    if place.resolve().parent.name == "snapshots":
        return place.resolve().name
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    files = [path for path in files if ".cache" not in path.relative_to(place).parts]
    notes = [place / ".cache/huggingface/download" / f"{path.relative_to(place)}.metadata" for path in files]
    if place.is_dir() and all(note.is_file() for note in notes):
        commits = {note.read_text(encoding="utf-8").split("\n")[0] for note in notes}
        if len(commits) == 1:
            return commits.pop()
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place.parent).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read())
    return f"files {digest.hexdigest()[:16]}"


def _read_place(place: Path, config: str | None, split: str, version: str) -> Sequence[dict[str, Any]] | None:
    """The table at a file or folder, `None` when it is not there."""
    # `datasets` knows a file by path and time, which a copy can keep: so each version has a cache of its own
    cache = str(Path(datasets_config.HF_DATASETS_CACHE) / "local" / version.removeprefix("files "))
    if place.is_file():
        return _read_files([place], cache)
    if not place.is_dir():
        return None
    if (place / "README.md").is_file() and "configs:" in (place / "README.md").read_text(encoding="utf-8"):
        _check_shards(sorted(file for file in place.rglob("*.parquet") if _may_hold(file, split)))
        return load_dataset(str(place), config, split=split, cache_dir=cache)
    for pattern in _PATTERNS if config else _PATTERNS_WITHOUT_CONFIG:
        stem = pattern.format(config=config, split=split)
        for suffix in (".parquet", ".jsonl", ".json"):
            files = sorted(file for file in place.glob(stem + suffix) if _may_hold(file, split))
            if files:
                return _read_files(files, cache)
    return None


def _may_hold(file: Path, split: str) -> bool:
    """Whether a file's name doesn't say that it holds another split."""
    named = _SPLIT.match(file.name)
    return named is None or file.name.startswith(split)


def _check_shards(files: Sequence[Path]) -> None:
    """Refuse tables in several files of which some are missing."""
    tables: dict[tuple[Path, str, int], list[str]] = {}
    for file in files:
        if shard := _SHARD.search(file.stem):
            tables.setdefault((file.parent, file.stem[: shard.start()], int(shard[2])), []).append(file.name)
    for (folder, _, parts), names in tables.items():
        if len(names) < parts:
            raise ValueError(f"{folder} must hold all {parts} parts of a table, it has {', '.join(names)}")


def _read_files(files: list[Path], cache: str) -> Sequence[dict[str, Any]]:
    if files[0].suffix == ".parquet":
        _check_shards(files)
        return load_dataset("parquet", data_files=[str(file) for file in files], split="train", cache_dir=cache)
    rows: list[dict[str, Any]] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        # read by json, not by datasets: ids are numbers in some rows of these files and strings in others
        lines = [line for line in text.split("\n") if line.strip()]
        rows += json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in lines]
    return rows
