"""A corpus of any form as numbered records, read in order and in flat memory; a broken record is a reason, not an end.

| corpus | a record |
|---|---|
| `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` | a row; see `tables.py`. Image columns of `datasets` stay encoded |
| a folder of files | each file, by its type: an image, a video, or the words of a `.txt` or `.md` |
| a folder that `datasets` saved, or the name of a data set on the hub (`name` or `name:split`), streamed | a row |

The columns `text`, `image` and `video` are the input, in the order of the columns; `id` names the row. How each form
is read stands in `tables.py` and `corpus_records.py`, what makes two corpora equal in `corpus_digest.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset_builder, load_from_disk

from recipes.data import corpus_records
from recipes.data.corpus_digest import CorpusDigest
from recipes.data.corpus_records import CONTENT
from recipes.data.tables import SUFFIXES, BrokenRecordError, as_text, parquet_facts


class Corpus:
    """A corpus that was opened.

    Attributes:
        folder: Where relative paths start from.
        num_rows: Records; None for a stream, whose end only shows when it is reached.
        digest: Changes with the content; see `corpus_digest.py`.
        others: Columns of the records read so far that hold no content, such as a misspelt `img`.
    """

    def __init__(
        self, start: Callable[[int], Iterator[Any]], folder: Path, num_rows: int | None, digest: CorpusDigest
    ) -> None:
        """`start` gives the records from a number on, `folder` is where paths start, `digest` holds what was read."""
        self.folder, self.num_rows, self.digest = folder, num_rows, digest.value()
        self.others: set[str] = set()
        self._start = start
        self._place, self._coming = -1, iter(())

    def records(self, first: int, stop: int) -> Iterator[Any]:
        """Records of a range: dicts, or a `BrokenRecordError` in the place of a broken one.

        A range behind the last one goes on where that ended, so a corpus read in order is read once.
        """
        self._go_to(first)
        while self._place < stop:
            try:
                record = next(self._coming)
            except StopIteration:
                return
            self._place += 1
            if isinstance(record, dict):
                self.others |= record.keys() - {*CONTENT, "id", "error"}
            yield record

    def has(self, number: int) -> bool:
        """Whether there is a record of that number."""
        if self.num_rows is not None:
            return number < self.num_rows
        for record in self.records(number, number + 1):
            self._place, self._coming = number, chain([record], self._coming)
            return True
        return False

    def _go_to(self, first: int) -> None:
        # A short way is passed over; a long one is begun anew, as most forms know a faster way than reading.
        if not 0 <= self._place <= first or first - self._place > 1000:
            self._place, self._coming = first, self._start(first)
        while self._place < first:
            next(self._coming, None)
            self._place += 1


def open_corpus(names: Sequence[str]) -> Corpus:
    """Open a corpus: files of one kind, one folder, or one name on the hub.

    All but streams are counted: one pass over files of text, the footers of Parquet files.

    Raises:
        ValueError: If there is nothing, the files are of several kinds, or there is no column text, image or video.
    """
    paths = [Path(name) for name in names]
    if len(paths) == 1 and not paths[0].is_file():
        return _open_folder(paths[0]) if paths[0].is_dir() else _open_stream(names[0])
    missing = [str(path) for path in paths if not path.is_file()]
    kinds = {{".json": ".jsonl", ".tsv": ".csv"}.get(path.suffix.lower(), path.suffix.lower()) for path in paths}
    if missing or len(kinds) != 1 or not kinds <= set(SUFFIXES):
        raise ValueError(
            f"the corpus must be files of one kind ({', '.join(SUFFIXES)}), one folder or one data set, got "
            f"{list(names)[:5]}; missing: {missing[:5] or 'none'}. Check the paths."
        )
    digest = CorpusDigest(paths[0].parent)
    for path in paths:
        digest.add_file(path)
    start = partial(corpus_records.of_tables, paths)
    if kinds == {".parquet"}:
        num_rows = 0
        for path in paths:
            names_of_columns, rows = parquet_facts(path)
            _need_content(names_of_columns, path)
            num_rows += rows
            digest.add_media_of_parquet(path, corpus_records.beside(path, paths[0]))
        return Corpus(start, paths[0].parent, num_rows, digest)
    num_rows = 0
    columns: set[str] = set()
    broken: BrokenRecordError | None = None
    for record in start(0):
        num_rows += 1
        if isinstance(record, dict):
            digest.add_media_of(record)
            columns |= record.keys() if len(columns) < 100 else set()
        else:
            broken = broken or record
    if not num_rows:
        raise ValueError(f"the corpus {list(names)[:5]} has no rows. Write some, or leave it out.")
    if broken and not columns:
        raise ValueError(f"the corpus {list(names)[:5]} has no row that can be read: {broken}.")
    _need_content(sorted(map(str, columns)), paths[0])
    return Corpus(start, paths[0].parent, num_rows, digest)


def _need_content(columns: Sequence[str], where: Path | str) -> None:
    if not set(CONTENT) & set(columns):
        raise ValueError(
            f"the corpus must have a column text, image or video, {where} has {list(columns)}. Rename one."
        )


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved the folder; else its files are the corpus."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _open_folder(folder: Path) -> Corpus:
    digest = CorpusDigest(folder)
    if is_saved(folder):
        saved = load_from_disk(str(folder))
        table = _undecoded(saved["train"] if isinstance(saved, DatasetDict) else saved, folder)
        digest.add(table._fingerprint)
        digest.add_media_of_table(table)
        return Corpus(partial(corpus_records.of_table, table), folder, len(table), digest)
    num_rows = 0
    for path in corpus_records.files_in(folder):
        digest.add_facts(path)
        num_rows += 1
    if not num_rows:
        raise ValueError(f"the folder {folder} holds no files. Check the path.")
    return Corpus(partial(corpus_records.of_folder, folder), folder, num_rows, digest)


def _open_stream(name: str) -> Corpus:
    """A data set of the hub: nothing is downloaded but what is read."""
    repository, _, split = name.partition(":")
    if repository.count("/") > 1 or Path(repository).suffix.lower() in SUFFIXES:
        raise ValueError(f"there is no file or folder {name!r}. Check the path.")
    builder = load_dataset_builder(repository)
    stream = _undecoded(builder.as_streaming_dataset(split=split or "train"), name)
    digest = CorpusDigest(Path())
    # The builder's id holds the revision of every file; its hash the code that reads them.
    digest.add(f"{repository}:{split or 'train'} {builder.config_id} {builder.hash}")
    return Corpus(partial(corpus_records.of_stream, stream), Path(), None, digest)


def _undecoded(table: Any, where: Path | str) -> Any:
    """Media as they are stored: the reader of `st_btok` decodes them."""
    _need_content(list(table.features or next(iter(table), {})), where)
    return corpus_records.undecoded(table)


def as_input(record: Any, folder: Path) -> dict[str, Any]:
    """The undecoded input of a record, in the order of its columns: a dict, so that no text is taken for a path.

    Relative paths start from `folder`. Raises `BrokenRecordError` if there is no content.
    """
    if isinstance(record, Exception):
        raise record
    if record.get("error") and not set(CONTENT) & record.keys():
        raise BrokenRecordError(record["error"])
    inputs: dict[str, Any] = {}
    for kind in record:
        if kind not in CONTENT:
            continue
        value = as_text(record[kind]) if kind == "text" else record[kind]
        if value is None or value in ("", []):
            continue
        inputs[kind] = value if kind == "text" else corpus_records.placed(value, folder)
    if not inputs or (inputs.keys() == {"text"} and isinstance(inputs["text"], str) and not inputs["text"].strip()):
        raise BrokenRecordError("the row is empty: neither text nor media")
    return inputs
