"""Files become items: which files, which items, and nothing from outside the folder."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.search import folder as module
from recipes.search.folder import PASSAGE_CHARS, LeftOut, Source, items_of, kind_of, list_sources


def test_files_of_a_kind_are_listed_in_order_without_hidden_ones(folder):
    found = [(source.path, source.kind) for source in list_sources(folder)]
    assert found == [
        ("bad.png", "image"), ("long.md", "text"), ("p0.png", "image"), ("p1.png", "image"), ("p2.png", "image"),
        ("report.pdf", "page"), ("sub/note.txt", "text"),
    ]  # fmt: skip


def test_what_is_not_listed_is_said(folder, tmp_path):
    for name in ("a.PSD", "b.psd", "c.docx", "d.svg", "no-suffix"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "outside.txt").write_text("outside")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("a")
    os.mkdir(os.fsencode(folder) + b"/d\xe9")
    with open(os.fsencode(folder) + b"/d\xe9/in.txt", "w") as file:
        file.write("a")
    left_out = LeftOut()
    listed = [source.path for source in list_sources(folder, None, left_out)]
    assert {"a.PSD", "b.psd", "sub/note.txt"} <= set(listed) and "link.txt" not in listed
    assert left_out.suffixes == {".exe": 1, ".docx": 1, ".svg": 1, "": 1}
    assert set(left_out.reasons) == {"link.txt", "caf\\xe9.txt", "d\\xe9/in.txt"}
    assert "not UTF-8. Rename it" in left_out.reasons["caf\\xe9.txt"]
    assert "links out of the folder" in left_out.reasons["link.txt"]


def test_an_unreadable_file_is_said(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "file_hash", refuse)
    left_out = LeftOut()
    assert not list(list_sources(folder, None, left_out))
    assert left_out.reasons["p0.png"] == "it can't be read: Permission denied" and len(left_out.reasons) == 7


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.avif", b"", "image"), ("a.TGA", b"", "image"), ("a.ico", b"", "image"), ("a.html", b"", "text"),
        ("a.mts", b"", "video"), ("a.m2ts", b"", "video"), ("a.ts", b"G" + b"\0" * 187 + b"G", "video"),
        ("a.ts", b"Goal: number = 3;", "text"), ("a.ts", b"", "text"), ("a.eps", b"", None),
    ],
)  # fmt: skip
def test_kinds(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name) == kind


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    (tmp_path / "outside.txt").write_text("outside")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "inner.txt").symlink_to(folder / "sub" / "note.txt")
    paths = [source.path for source in list_sources(folder)]
    assert "link.txt" not in paths and "inner.txt" in paths


def test_an_unchanged_file_is_not_read_again(folder, monkeypatch):
    known = {}
    for source in list_sources(folder):
        stat = (folder / source.path).stat()
        known[source.path] = (stat.st_size, stat.st_mtime_ns, source.content)
    (folder / "sub" / "note.txt").write_text("changed")
    read = []
    monkeypatch.setattr(module, "file_hash", lambda path: read.append(path.name) or "new")
    again = {source.path: source.content for source in list_sources(folder, known)}
    assert read == ["note.txt"] and again["sub/note.txt"] == "new" and again["p0.png"] == known["p0.png"][2]


def test_passages_hold_the_whole_text_and_know_their_lines(folder):
    items = list(items_of(folder, Source("long.md", "text", "")))
    assert len(items) == 3 and all(len(item.text) <= PASSAGE_CHARS for item in items)
    assert "".join("".join(item.text.split()) for item in items) == "redkitten" * 200
    lines = (folder / "long.md").read_text().split("\n")
    for item in items:
        assert lines[int(item.place.removeprefix("line ")) - 1] == item.value["text"].split("\n")[0]
    assert [item.last for item in items] == [False, False, True]


def test_a_text_without_blanks_is_cut_all_the_same(folder):
    (folder / "zh.txt").write_text("城" * 2500)
    assert [len(item.value["text"]) for item in items_of(folder, Source("zh.txt", "text", ""))] == [1000, 1000, 500]


def test_a_byte_order_mark_is_no_text(folder):
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert [item.value for item in items_of(folder, Source("bom.txt", "text", ""))] == [{"text": "words"}]
    (folder / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "words"}\n')
    assert [item.value for item in items_of(folder, Source("bom.jsonl", "text", ""))] == [{"text": "words"}]


def test_html_is_the_words_that_a_browser_shows(folder):
    page = (
        "<html><head><title>A page</title>\n<style>b {}</style><script>if (a < b) c()</script></head>\n<body><p>one "
    )
    page += "&amp; <b>two</b>\n\n\n<!-- no -->three</p></body></html>"
    (folder / "a.html").write_text(page)
    (item,) = items_of(folder, Source("a.html", "text", ""))
    assert item.text.split() == ["A", "page", "one", "&", "two", "three"] and item.place == "line 1"
    (folder / "b.html").write_text("<p>a</p>\n" * 700)
    last = list(items_of(folder, Source("b.html", "text", "")))[-1]
    start = int(last.place.removeprefix("line "))
    assert len(last.text.split()) == 700 - start + 1


def test_a_page_that_cannot_be_drawn_costs_only_itself(folder):
    """Five pages, the second and the fourth far too large."""
    pypdfium2 = pytest.importorskip("pypdfium2")
    document = pypdfium2.PdfDocument.new()
    for number in range(5):
        side = 14_000 if number in (1, 3) else 100 + number
        document.new_page(side, side)
    document.save(str(folder / "five.pdf"))
    items = list(items_of(folder, Source("five.pdf", "page", "")))
    assert [item.place for item in items] == [f"page {number}" for number in range(1, 6)]
    assert [bool(item.reason) for item in items] == [False, True, False, True, False] and items[-1].last
    assert [item.value["image"].width for item in items if item.value] == [200, 204, 208]
    assert "page 2 of" in items[1].reason and "page 4 of" in items[3].reason


def test_pages_of_a_pdf(folder):
    items = list(items_of(folder, Source("report.pdf", "page", "")))
    assert [(item.place, item.last) for item in items] == [("page 1", False), ("page 2", True)]


def test_a_text_that_is_not_utf8_says_so(folder):
    (folder / "latin.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ValueError, match="must be UTF-8.*latin.txt"):
        list(items_of(folder, Source("latin.txt", "text", "")))


def corpus(folder, *rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_rows_of_a_corpus_are_items_of_their_own_kinds(folder):
    path = corpus(
        folder, {"id": 7, "text": "a city"}, "", {"text": "what?", "image": "p0.png"}, {"video": "sub/v.mp4"}
    )
    (source,) = list_sources(path)  # alone, without the other files of its folder
    items = list(items_of(path, source))
    assert [(item.place, item.kind, item.last) for item in items] == [
        ("row 1", "text", False), ("row 3", "image", False), ("row 4", "video", True),
    ]  # fmt: skip
    assert items[0].value == {"text": "a city"}
    assert list(items[1].value.items()) == [("text", "what?"), ("image", str(folder / "p0.png"))]
    assert items == list(items_of(folder, source))  # the same inside a folder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../outside.png"}, "must lie below its folder"),
        ({"image": ["p0.png", "../outside.png"]}, "must lie below its folder"),
        ({"title": "a"}, "neither text nor media"),
        ("[1]", "line 2 of rows.jsonl is no JSON object"),
        ('{"text": "third",}', "line 2 of rows.jsonl is no JSON: a comma stands before the closing bracket"),
    ],
)
def test_a_bad_row_of_a_table_costs_only_itself(folder, row, message):
    path = corpus(folder, {"text": "a"}, row, {"text": "b"})
    items = list(items_of(folder, Source(path.name, "text", "")))
    assert [item.place for item in items] == ["row 1", "row 2", "row 3"] and message in items[1].reason
    assert [item.value for item in items] == [{"text": "a"}, None, {"text": "b"}] and items[2].last


def test_parquet_is_a_table_and_csv_one_where_it_stands_alone(folder):
    pq.write_table(pa.table({"text": [b"a", b"b"]}), folder / "c.parquet")
    assert [item.text for item in items_of(folder, Source("c.parquet", "text", ""))] == ["a", "b"]
    (folder / "c.csv").write_text("id;text\n1;a\n")
    assert [item.text for item in items_of(folder, Source("c.csv", "text", ""))] == ["id;text\n1;a"]
    assert [(item.text, item.place) for item in items_of(folder / "c.csv", Source("c.csv", "text", ""))] == [
        ("a", "row 2")
    ]
