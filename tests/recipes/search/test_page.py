"""What the page's buttons answer, without a browser; `tests/browser` clicks them."""

from __future__ import annotations

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image

from recipes.search import page_html
from recipes.search.index import frames_of, open_index, update
from recipes.search.lookup import Spread
from recipes.search.page import PREVIEW_PIXELS, Page, build_page, launch
from recipes.search.store import Hit
from tests.backbones import picture


@pytest.fixture
def page(tmp_path, qwen, folder):
    store, root = open_index(tmp_path / "index", qwen, folder)
    update(store, qwen, root, progress=False)
    return Page(store, qwen, root)


def search(page, text="", *files, kinds=(), path=""):
    return page.search({"text": text, "files": [str(file) for file in files]}, list(kinds), path)


def test_a_search_shows_hits_and_a_hit_its_details(page, folder):
    grid, status, hits = search(page, "What is the city?")
    assert hits[0].row["path"] == "sub/note.txt" and status.startswith("9 items, best first")
    assert grid.count("<button") == 9 and grid.count("<img") == 5 and "What is the city?" in grid
    first = grid.partition("</button>")[0]
    assert 'data-hit="' + hits[0].row["id"] in first and "sub/note.txt" in first and "width:100%" in first
    about = page.details(hits, hits[0].row["id"])
    assert "sub/note.txt" in about and "What is the city?" in about and "<img" not in about
    hit = next(hit for hit in hits if hit.row["place"] == "page 2")
    about = page.details(hits, hit.row["id"])
    assert about.count("<img") == 1 and "page 2" in about
    assert frames_of(page._value(hit), page.model, PREVIEW_PIXELS)[0].size == (
        56 * 2,
        84 * 2,
    )  # 72 dots per inch in the file, drawn at 144


def test_a_hit_of_an_earlier_search_is_not_a_hit_of_this_one(page):
    """The selection belongs to the results that it was made in."""
    _, _, before = search(page, "What is the city?")
    _, _, hits = search(page, "red kitten", kinds=["image"])
    text = next(hit.row["id"] for hit in before if hit.row["kind"] == "text")
    for answer in (page.details, page.explain):
        with pytest.raises(gr.Error, match="Click a hit first"):
            answer(hits, text)


def test_every_result_closes_the_details(page, folder):
    """In the page as it is wired: whatever shows results also empties the selection."""
    blocks = build_page(page.store, page.model, folder)
    shown = {block.elem_id: number for number, block in blocks.blocks.items() if block.elem_id}
    states = {number for number, block in blocks.blocks.items() if isinstance(block, gr.State)}
    writes_results = [fn for fn in blocks.fns.values() if shown["hits"] in {block._id for block in fn.outputs}]
    assert len(writes_results) == 4
    for fn in writes_results:
        written = {block._id for block in fn.outputs}
        assert {shown["about"], shown["details"], *states} <= written
    (search_fn, *_) = writes_results
    answer = search_fn.fn({"text": "red kitten", "files": []}, [], "")
    assert answer[-3:-1] == (None, "") and answer[-1]["visible"] is False


def test_a_picture_searches_and_more_like_it(page, folder):
    _, status, hits = search(page, "", folder / "p2.png", kinds=["image"])
    assert hits[0].row["path"] == "p2.png" and status.startswith("3 items that pass the filters, best first")
    _, _, again = page.more_like(hits, hits[1].row["id"], [], "")
    assert again[0].row["id"] == hits[1].row["id"]


def test_why(page, folder):
    _, _, hits = search(page, "", folder / "p2.png")
    about = page.explain(hits, hits[0].row["id"])
    assert about.count("<img") == 1 and "What they can write" in about and "p2.png" in about
    text = next(hit for hit in hits if hit.row["path"] == "sub/note.txt")
    about = page.explain(hits, text.row["id"])
    assert about.count("<mark") > 3 and "<img" not in about and "btok_" not in about and "im_start" not in about


def test_why_a_video(tmp_path, qwen):
    """A heat map for every step in time that the backbone sees: two frames of a Qwen2-VL."""
    (tmp_path / "clips").mkdir()
    frames = [picture(56, 56, number) for number in range(4)]
    frames[0].save(tmp_path / "clips" / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "rows.jsonl").write_text('{"video": "clips/a.gif"}\n')
    store, root = open_index(tmp_path / "index", qwen, tmp_path / "rows.jsonl")
    assert update(store, qwen, root, progress=False).new == 1
    page = Page(store, qwen, root)
    _, _, hits = search(page, "a", kinds=["video"])
    assert page.details(hits, hits[0].row["id"]).count("<img") == 1
    assert page.explain(hits, hits[0].row["id"]).count("<img") == 2


def test_the_heat_map_lies_over_the_picture():
    weights = np.zeros((2, 4))
    weights[0, 3] = 0.5
    drawn = np.asarray(page_html.heat(Image.new("RGB", (400, 200), "white"), weights, 0.5), dtype=int)
    assert drawn.shape == (200, 400, 3)
    assert drawn[0, -1].sum() > drawn[0, 0].sum() and np.ptp(drawn[0, -1]) > np.ptp(drawn[-1, 0])


def test_no_closer_than_random_items_is_said(page):
    hits = search(page, "What is the city?")[2]
    page.random = Spread(0.0, (hits[1].score + hits[0].score) / 2)
    grid, status, _ = search(page, "What is the city?")
    best, _, rest = grid.partition("From here on no closer")
    assert best.count("<button") == 1 and rest.count("<button") == 8 and "None is closer" not in status
    page.random = Spread(0.0, 1.5)
    grid, status, _ = search(page, "What is the city?")
    assert "None is closer to the query than random items" in status and grid.index("From here") < grid.index(
        "<button"
    )
    page.random = Spread(0.99, 0.999)
    assert "hardly tells these files apart" in page.welcome and "0.990" in page.welcome


def test_a_file_that_changed_is_never_shown_as_the_hit(page, folder):
    _, _, hits = search(page, "", folder / "p2.png")
    chosen = hits[0].row["id"]
    (folder / "p2.png").touch()  # another time, the same bytes
    assert "<img" in page.details(hits, chosen)
    (folder / "p2.png").write_bytes(b"something else")
    about = page.details(hits, chosen)
    assert "<img" not in about and "has changed or gone" in about
    with pytest.raises(gr.Error, match="has changed"):
        page.explain(hits, chosen)


def test_a_path_out_of_the_folder_is_never_opened(page, folder, tmp_path):
    (tmp_path / "outside.png").write_bytes((folder / "p0.png").read_bytes())
    _, _, hits = search(page, "", folder / "p0.png")
    hits[0].row["path"] = "../outside.png"  # as a forged index might say
    assert "<img" not in page.details(hits, hits[0].row["id"])


def test_nothing_asked_nothing_chosen_nothing_readable(page, tmp_path):
    grid, status, hits = search(page, " ")
    assert (grid, hits) == ("", []) and "9 items to search" in status
    with pytest.raises(gr.Error, match="Click a hit first"):
        page.more_like([], None, [], "")
    (tmp_path / "broken.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    for name in ("broken.png", "gone.png"):
        with pytest.raises(gr.Error) as raised:
            search(page, "", tmp_path / name)
        assert str(tmp_path) not in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(gr.Error, match="is PostScript"):
        search(page, "", tmp_path / "broken.png")


def test_words_that_are_a_path_are_words(page, folder):
    """A visitor can't make the server open its own files."""
    _, _, hits = search(page, str(folder / "p1.png"))
    expected = page.model.encode_query([{"text": str(folder / "p1.png")}])[0] @ page.store.vector(hits[0].row["id"])
    assert hits[0].score == pytest.approx(float(expected), abs=1e-5)


def test_names_are_text_and_never_markup(page, folder):
    (folder / "<img src=x onerror=alert(1)>.txt").write_text("<script>alert(1)</script> ${alert(2)} {{value}}")
    update(page.store, page.model, folder, progress=False)
    grid, _, hits = search(page, "<script>alert(1)</script>")
    hit = next(hit for hit in hits if hit.row["path"].startswith("<img"))
    for shown in (grid, page.details(hits, hit.row["id"]), page.explain(hits, hit.row["id"])):
        assert "<img src=x" not in shown and "<script" not in shown and "${" not in shown and "{{" not in shown
    assert "&lt;script" in grid


def test_a_grid_shows_all_of_a_name_and_a_bar_for_the_score():
    row = {"id": "1", "path": "a/" + "long" * 40 + ".txt", "place": "line 3", "text": "word " * 100, "thumbnail": b""}
    shown = page_html.grid([Hit(0.25, row), Hit(-0.5, {**row, "id": "2"})])
    assert row["path"] in shown and "line 3" in shown and "width:25%" in shown and "width:0%" in shown


@pytest.fixture
def served(page, folder, tmp_path, monkeypatch):
    """The page's address, with the temporary folder inside the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "tmp"))
    blocks = build_page(page.store, page.model, folder)
    _, address, _ = launch(blocks, "127.0.0.1", None, block=False, allowed_hosts=["search.example"])
    yield address
    blocks.close()


def test_the_server_checks_host_size_and_files(served, tmp_path):
    with httpx.Client(trust_env=False) as client:
        assert client.get(served).status_code == 200
        for host, status in {"evil.example": 400, "localhost:7860": 200, "search.example": 200}.items():
            assert client.get(served, headers={"Host": host}).status_code == status
            assert client.get(f"{served}config", headers={"Host": host}).status_code == status
        small = client.post(f"{served}gradio_api/upload", files={"files": ("a.png", b"0" * 1000)})
        assert small.status_code == 200
        large = client.post(f"{served}gradio_api/upload", files={"files": ("a.png", b"0" * (33 * 2**20))})
        assert large.status_code == 413 and str(tmp_path) not in large.text
        (tmp_path / "own.txt").write_text("own")
        for route in ("file=", "gradio_api/file="):
            assert client.get(f"{served}{route}{tmp_path / 'own.txt'}").status_code >= 400
            assert client.get(f"{served}{route}{tmp_path / 'files' / 'p0.png'}").status_code >= 400


def test_a_table_in_the_place_of_a_folder(tmp_path, qwen, folder):
    path = folder / "rows.jsonl"
    path.write_text('{"text": "What is the city?"}\n{"text": "red kitten", "image": "p1.png"}\n')
    store, root = open_index(tmp_path / "index", qwen, path)
    report = update(store, qwen, root, progress=False)
    assert report.new == 1 and store.count() == 2 and not report.left_out
    page = Page(store, qwen, root)
    grid, _, hits = search(page, "What is the city?")
    assert [(hit.row["place"], hit.row["kind"]) for hit in hits] == [("row 1", "text"), ("row 2", "image")]
    assert grid.count("<img") == 1 and frames_of(page._value(hits[1]), page.model, PREVIEW_PIXELS)[0].size == (56, 56)
    assert update(store, qwen, root, progress=False).unchanged == 1
    csv = folder / "rows.csv"
    picture(28, 28).save(folder / "q.png")
    csv.write_text("text;image\nblue;q.png\n")
    store, root = open_index(tmp_path / "other", qwen, csv)
    assert update(store, qwen, root, progress=False).new == 1
    page = Page(store, qwen, root)
    _, _, hits = search(page, "blue")
    csv.touch()  # another time, the same bytes
    assert hits[0].row["place"] == "row 2" and "<img" in page.details(hits, hits[0].row["id"])
