"""Tables of every kind and state: the rows that a person sees in them, and a reason in the place of a broken one."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.data.tables import BrokenRecordError, as_id, as_text, parquet_facts, read_table

MARK = b"\xef\xbb\xbf"
ROWS = [{"id": "007", "text": "Äpfel, Birnen"}, {"id": "b", "text": 'NA "x"'}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLES = {
    "a.jsonl": LINES,
    "b.jsonl": LINES.replace("\n", "\r\n\r\n"),
    "a.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "b.json": LINES,
    "a.csv": 'id,text\n007,"Äpfel, Birnen"\nb,"NA ""x"""\n',
    "b.csv": 'id;text\r\n\r\n007;Äpfel, Birnen\r\nb;"NA ""x"""\r\n',
    "c.csv": 'id|text\n007|Äpfel, Birnen\nb|"NA ""x"""',
    "a.tsv": 'id\ttext\n007\tÄpfel, Birnen\nb\t"NA ""x"""\n',
}


def rows(path) -> list:
    return [row if isinstance(row, dict) else str(row) for _, row in read_table(path)]


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
@pytest.mark.parametrize("name", TABLES)
def test_every_form_holds_the_same_rows_with_a_byte_order_mark_or_without(tmp_path, name, mark):
    (tmp_path / name).write_bytes(mark + TABLES[name].encode())
    assert rows(tmp_path / name) == ROWS
    assert [row for _, row in read_table(tmp_path / name, first=1)] == ROWS[1:]


def test_cells_are_texts_as_they_are_written(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text(
        "query,positive\n" + "".join(f"{cell},b\n" for cell in ("NA", "null", "None", "007", "2024-01-05"))
    )
    assert [row["query"] for row in rows(path)] == ["NA", "null", "None", "007", "2024-01-05"]
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"a": 1.10, "b": 12345678901234567890, "c": NaN, "d": null, "e": true, "f": {"text": 5}, "g": [2]}'
    )
    assert rows(path) == [
        {"a": "1.10", "b": "12345678901234567890", "c": None, "d": None, "e": True, "f": {"text": "5"}, "g": ["2"]}
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "third",}', "line 3 of c.jsonl is no JSON: a comma stands before the closing bracket. Remove it"),
        ('{"text": ["third", ]}', "a comma stands before the closing bracket"),
        ('{"text": "third"},', "line 3 of c.jsonl is no JSON: a comma stands behind the object. Remove it"),
        ("{'text': 'third'}", "double quotes"),
        ('{"text": "thi', "line 3 of c.jsonl is no JSON: Unterminated string starting at at character 10"),
        ("[1]", "line 3 of c.jsonl is no JSON object"),
        (b'{"text": "\xe4"}', r"line 3 of c.jsonl is not UTF-8 \(byte 0xe4\).*iconv"),
        ("[" * 100_000, "too deep"),
    ],
)
def test_a_broken_line_is_a_broken_row(tmp_path, line, reason):
    good = b'{"text": "a"}\n'
    path = tmp_path / "c.jsonl"
    path.write_bytes(good + good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    found = list(read_table(path))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [row for _, row in found if isinstance(row, dict)] == [{"text": "a"}] * 3
    with pytest.raises(BrokenRecordError, match=reason):
        raise found[2][1]
    assert "\n" not in str(found[2][1])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'"c" c,d\n', "line 3 of c.csv is no CSV: .*quotes inside it are doubled"),
        (b'"c,d\n', "line 3 of c.csv is no CSV: .*must end in a quote"),
        (
            b"c, c,d\n",
            "line 3 of c.csv has 3 fields, its header 2. Put texts that hold the separator into double quotes",
        ),
        (b"\xe4,d\n", r"line 3 of c.csv is not UTF-8 \(byte 0xe4\)"),
        (b'"c\n\xe4",d\n', r"line 4 of c.csv is not UTF-8"),
    ],
)
def test_a_broken_record_of_csv_costs_only_itself(tmp_path, line, reason):
    path = tmp_path / "c.csv"
    path.write_bytes(b"query,positive\na,b\n" + line + b'e,"f\ng"\nh,i,\n')
    found = list(read_table(path))
    assert [row for _, row in found if isinstance(row, dict)] == [
        {"query": "a", "positive": "b"}, {"query": "e", "positive": "f\ng"}, {"query": "h", "positive": "i"},
    ]  # fmt: skip
    ((number, error),) = [entry for entry in found if not isinstance(entry[1], dict)]
    assert number == 3
    with pytest.raises(BrokenRecordError, match=reason):
        raise error


def test_a_short_record_lacks_its_last_cells(tmp_path):
    (tmp_path / "c.csv").write_text("query,positive\na\n")
    assert rows(tmp_path / "c.csv") == [{"query": "a", "positive": None}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("c.csv", b"", "the file '.*c.csv' is empty. Write"),
        ("c.xlsx", b"PK", "a table must be one of .jsonl, .json, .csv, .tsv, .parquet, got"),
        ("c.csv", b"\xff\xfea\0", "c.csv is UTF-16. Save it as UTF-8: iconv"),
        ("c.csv", b"\xe4,text\na,b\n", "line 1 of c.csv is not UTF-8"),
        ("c.csv", b"text,text\na,b\n", r"must name every column once, and names \['text'\] twice"),
        ("c.json", b'[{"a": 1},\n {"a": 2,}]', "c.json is no JSON list in line 2: a comma stands before the closing"),
        ("c.json", b'[{"a": "\xe4"}]', "line 1 of c.json is not UTF-8"),
        ("c.json", b'{\n "rows": []\n}', "c.json must hold a list of objects, .* is one object over many lines"),
        ("c.parquet", b"PAR1 no more PAR1", "c.parquet is no Parquet file, or a damaged one"),
    ],
)
def test_a_file_that_is_no_table_says_so_in_one_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as raised:
        list(read_table(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file '.*gone.csv'. Check the path"):
        next(read_table(tmp_path / "gone.csv"))


def test_parquet_from_any_row_on(tmp_path):
    pq.write_table(pa.table({"text": [str(i) for i in range(300)]}), tmp_path / "c.parquet", row_group_size=100)
    for first in (0, 63, 64, 99, 100, 250, 299, 300):
        found = list(read_table(tmp_path / "c.parquet", first))
        assert found == [(i + 1, {"text": str(i)}) for i in range(first, 300)]
    assert parquet_facts(tmp_path / "c.parquet") == (["text"], 300)


def test_a_cell_as_text():
    assert [as_text(value) for value in (5, 1.5, b"\xc3\xa4", "a", None, True, float("nan"))] == [
        "5", "1.5", "ä", "a", None, True, None,
    ]  # fmt: skip
    assert as_text(datetime.date(2024, 1, 5)) == "2024-01-05"
    with pytest.raises(BrokenRecordError, match="a text must be UTF-8, got 2 bytes that are not"):
        as_text(b"\xff\xfe")
    assert as_id(b"\xff\xfe") == "fffe" and as_id(7) == "7"
