"""Tables that a user brings, read in one way for training, corpora and search.

| file | a row | its number |
|---|---|---|
| `.jsonl` | the object on a line; blank lines are passed over | line |
| `.json` | an object of the list that the file holds; without a list as `.jsonl` | place in the list, from 1 |
| `.csv`, `.tsv` | a record, by the header | line on which it begins |
| `.parquet` | a row | row, from 1 |

Text is UTF-8; a byte-order mark in front of it, as Excel writes, is no part of the text. Fields of `.csv` are
separated by commas, or by semicolons, tabs or bars where the header has no comma. Cells are texts as they are written:
digits, dates, `NA`, `null` and `None` too, and so are the numbers of JSON. A row that can't be read is a reason in its
place and never costs its neighbours.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
_LARGEST_LIST = 2**30  # bytes of a `.json` list, which is parsed as a whole
_LARGEST_FIELD = 2**26  # characters of a CSV field: what an unclosed quote can swallow
_PARQUET_ROWS = 64


class BrokenRecordError(ValueError):
    """A row without an input; the message says which, why and what to do."""


Row = tuple[int, dict[str, Any] | BrokenRecordError]


def read_table(path: str | Path, first: int = 0) -> Iterator[Row]:
    """Rows of a file, one after the other, in flat memory (except for a `.json` list).

    Args:
        path: A file with a suffix of `SUFFIXES`.
        first: Rows to pass over; whole row groups of Parquet are passed over unread.

    Yields:
        The number of a row, as in the table above, and the row by column, or the reason why it can't be read.

    Raises:
        ValueError: If there is no such file, it is empty, not of its kind, or not UTF-8 where its header stands.
    """
    place = Path(path)
    _check_file(place)
    if place.suffix.lower() == ".parquet":
        yield from _parquet_rows(place, first)
        return
    kind = place.suffix.lower()
    rows = _csv_rows(place) if kind in (".csv", ".tsv") else _json_rows(place)
    for number, row in enumerate(rows):
        if number >= first:
            yield row


def as_text(value: Any) -> Any:
    """A cell of a text column: numbers, dates and UTF-8 bytes as text, NaN as None, anything else as it is.

    Raises:
        BrokenRecordError: If it holds bytes that are not UTF-8.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BrokenRecordError(
                f"a text must be UTF-8, got {len(value)} bytes that are not ({error.reason} at byte {error.start}). "
                "Decode them, or call the column image or video if they are one"
            ) from error
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, int | float | Decimal | date | time) and not isinstance(value, bool):
        return str(value)
    return value


def as_id(value: Any) -> Any:
    """A cell of an id column: as `as_text`; bytes that are not UTF-8 (binary UUIDs, hashes) in hexadecimal digits."""
    try:
        return as_text(value)
    except BrokenRecordError:
        return value.hex()


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a table must be one of {', '.join(SUFFIXES)}, got {str(path)!r}.")
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}. Check the path.")
    if not path.stat().st_size:
        raise ValueError(f"the file {str(path)!r} is empty. Write its rows, or leave it out.")


@contextmanager
def _opened(path: Path, newline: str) -> Iterator[io.TextIOWrapper]:
    """Text without its byte-order mark; bytes that are not UTF-8 become characters that `_check_utf8` finds."""
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path.name} is UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}.")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        yield file


def _check_utf8(path: Path, number: int, line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise BrokenRecordError(
            f"line {number} of {path.name} is not UTF-8 (byte 0x{ord(line[error.start]) & 0xFF:02x}). Save the file "
            f"as UTF-8, from Latin-1: iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from None


def _json_rows(path: Path) -> Iterator[Row]:
    with _opened(path, "\n") as lines:
        is_list = False
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text:
                continue
            if path.suffix.lower() == ".json" and text.startswith("["):
                is_list = True
                break
            if path.suffix.lower() == ".json" and text == "{":
                raise ValueError(
                    f"{path.name} must hold a list of objects, or an object on each line, and is one object over many "
                    "lines. Save the list itself."
                )
            yield number, _json_object(path, number, text)
    if is_list:
        yield from _listed(path)


def _json_object(path: Path, number: int, line: str) -> dict[str, Any] | BrokenRecordError:
    try:
        _check_utf8(path, number, line)
        record = _parsed(line)
        _check_halves(f"line {number} of {path.name}", line, record)
    except BrokenRecordError as error:
        return error
    except json.JSONDecodeError as error:
        return BrokenRecordError(f"line {number} of {path.name} is no JSON: {_json_reason(line, error)}")
    except RecursionError:
        return BrokenRecordError(f"line {number} of {path.name} is no JSON that can be read: too deep. Flatten it")
    if not isinstance(record, dict):
        return BrokenRecordError(f"line {number} of {path.name} is no JSON object. Write {{...}} on every line")
    return record


def _parsed(text: str) -> Any:
    """JSON with its numbers as they are written."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda name: None)


def _check_halves(where: str, text: str, record: Any) -> None:
    """JSON can escape half a character (an emoji that was cut in two), which no text in UTF-8 may hold."""
    if "\\u" not in text:
        return
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = json.dumps(error.object[error.start])
        raise BrokenRecordError(
            f"{where} holds half a character, {half}: a text that was cut inside an emoji. Remove it"
        ) from None


def _json_reason(text: str, error: json.JSONDecodeError) -> str:
    before, rest = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if (before.endswith(",") and rest[:1] in ("}", "]")) or re.match(r",\s*[}\]]", rest):
        return "a comma stands before the closing bracket. Remove it"
    if rest == ",":
        return "a comma stands behind the object. Remove it"
    if text.lstrip().startswith("{'"):
        return "names and texts must stand in double quotes. Write it with json.dumps"
    return f"{error.msg} at character {error.colno}. Repair the line"


def _listed(path: Path) -> Iterator[Row]:
    if (size := path.stat().st_size) > _LARGEST_LIST:
        raise ValueError(f"a .json list of at most {_LARGEST_LIST} bytes is read, {path.name} has {size}. Use .jsonl.")
    with _opened(path, "\n") as file:
        text = file.read()
    for number, line in enumerate(text.split("\n"), 1):
        try:
            _check_utf8(path, number, line)
        except BrokenRecordError as error:
            raise ValueError(f"{error}.") from None
    try:
        records = _parsed(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where, reason = "", "too deep"
        if isinstance(error, json.JSONDecodeError):
            where, reason = f" in line {error.lineno}", _json_reason(text, error)
        raise ValueError(
            f"{path.name} is no JSON list{where}: {reason}. In .jsonl, one object a line, a broken one costs only "
            "itself."
        ) from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            record = BrokenRecordError(f"item {number} of {path.name} is no JSON object. Remove it")
        else:
            try:
                _check_halves(f"item {number} of {path.name}", text, record)
            except BrokenRecordError as error:
                record = error
        yield number, record


class _Lines:
    """Numbered lines; those of the record in work are kept, as what breaks is read again behind its first line."""

    def __init__(self, lines: io.TextIOWrapper) -> None:
        self._lines, self._again = enumerate(lines, 1), deque[tuple[int, str]]()
        self.record: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.record.append(line)
        return line[1]

    def begin_behind_first(self) -> None:
        self._again.extendleft(reversed(self.record[1:]))


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_FIELD)
    with _opened(path, "") as file:
        lines = _Lines(file)
        reader, header = None, []
        while True:
            lines.record = []
            try:
                if reader is None:
                    separator = _separator(path, lines)
                    reader = csv.reader(lines, delimiter=separator, strict=True)
                fields = next(reader)
                for number, line in lines.record:
                    _check_utf8(path, number, line)
            except StopIteration:
                return
            except csv.Error as error:
                number = lines.record[0][0]
                lines.begin_behind_first()
                reader = csv.reader(lines, delimiter=separator, strict=True)
                fields = BrokenRecordError(
                    f"line {number} of {path.name} is no CSV: {error}. A text in quotes must end in a quote, and "
                    "quotes inside it are doubled"
                )
            except BrokenRecordError as error:
                fields = error
            if not header:
                header = _header(path, fields)
            elif fields:
                yield lines.record[0][0], _csv_record(path, lines.record[0][0], header, fields)


def _separator(path: Path, lines: _Lines) -> str:
    """The comma; another one where the header has none."""
    header = next(lines)
    lines._again.append(lines.record.pop())
    if path.suffix.lower() == ".tsv":
        return "\t"
    return next((separator for separator in ",;\t|" if separator in header), ",")


def _header(path: Path, fields: list[str] | BrokenRecordError) -> list[str]:
    if isinstance(fields, BrokenRecordError):
        raise ValueError(f"{fields}.")
    header = [field.strip() for field in fields]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ValueError(
            f"the header of {path.name} must name every column once, and names {twice} twice. Rename them."
        )
    return header


def _csv_record(
    path: Path, number: int, header: list[str], fields: list[str] | BrokenRecordError
) -> dict[str, Any] | BrokenRecordError:
    if isinstance(fields, BrokenRecordError):
        return fields
    if any(fields[len(header) :]):
        return BrokenRecordError(
            f"line {number} of {path.name} has {len(fields)} fields, its header {len(header)}. Put texts that hold "
            "the separator into double quotes"
        )
    cells = [*fields, *[None] * (len(header) - len(fields))]
    return dict(zip(header, cells, strict=False))


def parquet_facts(path: str | Path) -> tuple[list[str], int]:
    """Columns and number of rows of a Parquet file, out of its footer; a `ValueError` if it is empty or damaged."""
    _check_file(Path(path))
    with _parquet(Path(path)) as file:
        return file.schema_arrow.names, file.metadata.num_rows


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path.name} is no Parquet file, or a damaged one: {first} Write it again.") from error


def _parquet_rows(path: Path, first: int) -> Iterator[Row]:
    with _parquet(path) as file:
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number + size <= first:
                number += size
                continue
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group]):
                start = min(max(first - number, 0), len(batch))
                yield from enumerate(batch.slice(start).to_pylist(), number + start + 1)
                number += len(batch)
