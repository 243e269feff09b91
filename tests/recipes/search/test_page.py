"""What the page's buttons answer, without a browser; `tests/browser` clicks them."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest

from recipes.search.index import open_index, update
from recipes.search.page import Page, build_page


@pytest.fixture
def page(tmp_path, qwen, folder):
    store, root = open_index(tmp_path / "index", qwen, folder)
    update(store, qwen, root, progress=False)
    return Page(store, qwen, root)


def test_a_search_shows_hits_and_a_hit_its_details(page, folder):
    gallery, hits, status, chosen, *_ = page.search("What is the city?", None, [], "")
    assert hits[0].row["path"] == "sub/note.txt" and "of 9 items" in status and chosen is None
    assert gallery[0][1].startswith("1.000  sub/note.txt") and gallery[0][0].size == (256, 256)  # a card with the text
    index, about, picture, *_ = page.details(hits, SimpleNamespace(index=0))
    assert index == 0 and "sub/note.txt" in about and "What is the city?" in about and picture is None
    number = next(i for i, hit in enumerate(hits) if hit.row["place"] == "page 2")
    _, about, picture, *_ = page.details(hits, SimpleNamespace(index=number))
    assert picture.size == (56 * 2, 84 * 2)  # 72 dots per inch in the file, drawn at 144


def test_a_picture_searches_and_more_like_it(page, folder):
    _, hits, *_ = page.search("", str(folder / "p2.png"), ["image"], "")
    assert hits[0].row["path"] == "p2.png" and len(hits) == 3
    _, again, *_ = page.more_like(hits, 1, [], "")
    assert again[0].row["id"] == hits[1].row["id"]


def test_why(page, folder):
    _, hits, *_ = page.search("", str(folder / "p2.png"), [], "")
    heat, text = page.explain(hits, 0)
    assert np.asarray(heat).std() > 0 and isinstance(text, str)


def test_a_file_that_changed_is_never_shown_as_the_hit(page, folder):
    _, hits, *_ = page.search("", str(folder / "p2.png"), [], "")
    (folder / "p2.png").touch()  # another time, the same bytes
    assert page.details(hits, SimpleNamespace(index=0))[2] is not None
    (folder / "p2.png").write_bytes(b"something else")
    _, about, picture, *_ = page.details(hits, SimpleNamespace(index=0))
    assert picture is None and "has changed or gone" in about
    with pytest.raises(gr.Error, match="has changed"):
        page.explain(hits, 0)


def test_a_path_out_of_the_folder_is_never_opened(page, folder, tmp_path):
    (tmp_path / "outside.png").write_bytes((folder / "p0.png").read_bytes())
    _, hits, *_ = page.search("", str(folder / "p0.png"), [], "")
    hits[0].row["path"] = "../outside.png"  # as a forged index might say
    assert page.details(hits, SimpleNamespace(index=0))[2] is None


def test_nothing_asked_nothing_chosen_nothing_readable(page, tmp_path):
    assert "Type a query" in page.search(" ", None, [], "")[2]
    with pytest.raises(gr.Error, match="Click a hit first"):
        page.more_like([], None, [], "")
    (tmp_path / "broken.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(gr.Error, match="is PostScript"):
        page.search("", str(tmp_path / "broken.png"), [], "")


def test_names_are_text_and_never_markup(page, folder):
    (folder / "<img src=x onerror=alert(1)>.txt").write_text("<script>alert(1)</script>")
    update(page.store, page.model, folder, progress=False)
    _, hits, *_ = page.search("<script>alert(1)</script>", None, [], "")
    number = next(i for i, hit in enumerate(hits) if hit.row["path"].startswith("<img"))
    about = page.details(hits, SimpleNamespace(index=number))[1]
    assert "<img" not in about and "<script" not in about and "&lt;script" in about


def test_the_page_is_built(page, folder):
    assert isinstance(build_page(page.store, page.model, folder), gr.Blocks)


def test_a_corpus_in_the_place_of_a_folder(tmp_path, qwen, folder):
    path = folder / "rows.jsonl"
    path.write_text('{"text": "What is the city?"}\n{"text": "red kitten", "image": "p1.png"}\n')
    store, root = open_index(tmp_path / "index", qwen, path)
    report = update(store, qwen, root, progress=False)
    assert report.new == 1 and store.count() == 2 and not report.left_out
    page = Page(store, qwen, root)
    gallery, hits, *_ = page.search("What is the city?", None, [], "")
    assert [(hit.row["place"], hit.row["kind"]) for hit in hits] == [("row 1", "text"), ("row 2", "image")]
    assert gallery[1][0].size == (56, 56)
    assert page.details(hits, SimpleNamespace(index=1))[2].size == (56, 56)
    assert update(store, qwen, root, progress=False).unchanged == 1
