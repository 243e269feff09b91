"""Files become items: which files, which items, and nothing from outside the folder."""

from __future__ import annotations

import json

import pytest

from recipes.search import folder as module
from recipes.search.folder import PASSAGE_CHARS, Source, items_of, list_sources


def test_files_of_a_kind_are_listed_in_order_without_hidden_ones(folder):
    found = [(source.path, source.kind) for source in list_sources(folder)]
    assert found == [
        ("bad.png", "image"), ("long.md", "text"), ("p0.png", "image"), ("p1.png", "image"), ("p2.png", "image"),
        ("report.pdf", "page"), ("sub/note.txt", "text"),
    ]  # fmt: skip


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
    assert len(items) == 3 and all(len(item.value) <= PASSAGE_CHARS for item in items)
    assert "".join("".join(item.value.split()) for item in items) == "redkitten" * 200
    lines = (folder / "long.md").read_text().split("\n")
    for item in items:
        assert lines[int(item.place.removeprefix("line ")) - 1] == item.value.split("\n")[0]
    assert [item.last for item in items] == [False, False, True]


def test_a_text_without_blanks_is_cut_all_the_same(folder):
    (folder / "zh.txt").write_text("城" * 2500)
    assert [len(item.value) for item in items_of(folder, Source("zh.txt", "text", ""))] == [1000, 1000, 500]


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
    assert items[0].value == "a city"
    assert list(items[1].value.items()) == [("text", "what?"), ("image", str(folder / "p0.png"))]
    assert items == list(items_of(folder, source))  # the same inside a folder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../outside.png"}, "must lie in"),
        ({"title": "a"}, "must have a text, image or video, row 1 has .'title'"),
        ("[1]", "must be a JSON object, row 1 is not"),
        ("{", "must be a JSON object, row 1 is not"),
    ],
)
def test_a_bad_row_of_a_corpus_says_which(folder, row, message):
    with pytest.raises(ValueError, match=message):
        list(items_of(folder, Source(corpus(folder, row).name, "text", "")))
