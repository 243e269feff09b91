"""The search page in a real browser: `make browser` (Debian's chromium, driven by Playwright).

The page stands over a folder of drawn words and pages that the model has never seen. With the quickstart's model in
`btok-quickstart/` the right pictures must come first; without it the shipped backbone, untrained, serves, and only
what does not need training is asked: a text finds itself, a picture finds itself.

After `make demo` the page over its photographs is opened as well. `SCREENSHOTS=FOLDER make browser` keeps pictures of
all that was seen; `docs/search_page.png` is `search_photographs_1400.png` of them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import httpx
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make browser")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

from sentence_transformers import SentenceTransformer  # noqa: E402  (after the skips)

from recipes.search.index import open_index, update  # noqa: E402
from recipes.search.page import build_page, launch  # noqa: E402
from st_btok import build_model  # noqa: E402
from tests.browser.drawn_words import write_words  # noqa: E402

ROOT = Path(__file__).parents[2]
TRAINED = Path(os.environ.get("BTOK_QUICKSTART", ROOT / "btok-quickstart"))
DEMO = ROOT / "btok-demo"  # of `make demo`
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ""))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """(address, captions, folder) of a page that is being served."""
    root = tmp_path_factory.mktemp("search")
    captions = write_words(root / "files")
    if TRAINED.exists():
        model = SentenceTransformer(str(TRAINED), device="cpu")
    else:
        model = build_model(str(ROOT / "recipes" / "backbone"), device="cpu", model_kwargs={"dtype": "float32"})
    store, folder = open_index(root / "index", model, root / "files")
    update(store, model, folder, progress=False)
    (root / "outside.txt").write_text("outside")
    blocks = build_page(store, model, folder)
    _, address, _ = launch(blocks, "127.0.0.1", 7871, block=False)
    yield address, captions, root
    blocks.close()


@pytest.fixture(scope="module")
def gallery():
    """Address of the page over the photographs of `make demo`."""
    if not (DEMO / "index").exists():
        pytest.skip("needs the photographs: make demo")
    model = SentenceTransformer(str(DEMO / "model"), device="cpu")
    store, folder = open_index(DEMO / "index", model)
    blocks = build_page(store, model, folder)
    _, address, _ = launch(blocks, "127.0.0.1", 7872, block=False)
    yield address
    blocks.close()


@pytest.fixture(params=[1400, 390], ids=["wide", "phone"])
def new_tab(request, tmp_path):
    """Opens an address in a browser of this width."""
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
        browser = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=CHROMIUM,
            args=[*options, "--disable-component-update"],
            viewport={"width": request.param, "height": 1000 if request.param > 1000 else 844},
        )
        page = browser.new_page()
        page.set_default_timeout(60_000)

        def opened(address: str):
            page.goto(address)
            page.wait_for_selector("#query textarea")
            return page

        yield opened
        browser.close()


@pytest.fixture
def tab(new_tab, shop):
    return new_tab(shop[0])


@pytest.fixture
def shot(tab):
    return lambda name: save_shot(tab, name)


def save_shot(tab, name: str) -> None:
    """Saves what is seen, where the environment names a folder for it."""
    if SCREENSHOTS.name:
        tab.wait_for_timeout(500)
        tab.screenshot(path=str(SCREENSHOTS / f"search_{name}_{tab.viewport_size['width']}.png"))


def hits(tab) -> list[str]:
    """Names in the grid, best first."""
    return tab.locator("#hits .card .path").all_inner_texts()


def searched(tab, text: str) -> list[str]:
    """Names of the hits of a text; waits for a grid that was not there before."""
    tab.evaluate("document.querySelector('#hits .grid')?.setAttribute('data-old', '')")
    tab.fill("#query textarea", text)
    tab.click("#query .submit-button")
    tab.wait_for_selector("#hits .grid:not([data-old]) .card")
    return hits(tab)


def opened(tab, number: int) -> str:
    """The name of a hit that was clicked, as the details tell it."""
    name = hits(tab)[number]
    tab.locator("#hits .card").nth(number).click()
    tab.wait_for_function("name => document.querySelector('#about .path')?.innerText === name", arg=name)
    return name


def test_before_the_first_search_there_are_no_empty_boxes(tab, shot):
    assert "items to search" in tab.locator("#status").inner_text()
    assert tab.locator("#hits .card").count() == 0 and tab.locator("#details").count() == 0
    assert not tab.locator("#kinds").is_visible() and not tab.locator("#path").is_visible()
    shot("start")


def test_a_typed_query_finds_the_right_first_hit(tab, shop, shot):
    _, captions, _ = shop
    found = searched(tab, "These pictures were drawn by the quickstart's own code.")
    assert found[0] == "readme.txt" and len(found) == 30
    assert tab.locator("#hits .card").first.locator("img").count() == 0
    assert "quickstart's own code" in tab.locator("#hits .card .words").first.inner_text()
    if not TRAINED.exists():
        return
    first = [searched(tab, caption)[0] for caption in captions[:5]]
    shot("grid")
    assert sum(name == f"words/{number:03}.png" for number, name in enumerate(first)) >= 4, first
    assert "None is closer" not in tab.locator("#status").inner_text()
    assert tab.locator("#hits .chance").count() == 1
    searched(tab, "qwxz vvkj")
    assert "None is closer" in tab.locator("#status").inner_text()


def test_the_query_and_the_first_hits_are_on_the_first_screen(tab):
    searched(tab, "red kitten")
    tab.evaluate("window.scrollTo(0, 0)")
    query, *cards = (
        tab.locator(name).nth(number).bounding_box()
        for name, number in (("#query", 0), ("#hits .card", 0), ("#hits .card", 1))
    )
    assert query["y"] >= 0 and all(card["y"] + card["height"] <= tab.viewport_size["height"] for card in cards)
    assert cards[0]["x"] < cards[1]["x"] and cards[0]["y"] == cards[1]["y"], "two beside each other"
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= tab.viewport_size["width"], "nothing stands out to the right"


def test_a_second_search_forgets_the_hit_that_was_clicked(tab, shot):
    """Once the third hit of the new results was shown in large, and "Why?" asked for a click."""
    searched(tab, "red kitten")
    opened(tab, 2)
    shot("details")
    if tab.viewport_size["width"] < 760:
        tab.click("#close")  # there the details lie over the query
        tab.wait_for_selector("#details", state="hidden")
    searched(tab, "These pictures were drawn by the quickstart's own code.")
    assert tab.locator("#details").count() == 0 or not tab.locator("#details").is_visible()
    assert tab.locator("#hits .chosen").count() == 0
    third = opened(tab, 2)
    tab.click("#why")
    tab.wait_for_selector("#generated")
    assert tab.locator("#about .path").inner_text() == third and tab.locator(".toast-wrap").inner_text().strip() == ""
    tab.evaluate("document.querySelector('#hits .grid').setAttribute('data-old', '')")
    tab.click("#more")
    tab.wait_for_selector("#hits .grid:not([data-old]) .card")
    assert hits(tab)[0] == third
    assert tab.locator("#hits .score").first.inner_text().strip() == "1.000"


def test_a_picture_its_details_and_the_heat_map(tab, shop, shot):
    _, _, root = shop
    tab.set_input_files("#query input[type=file]", str(root / "files" / "words" / "003.png"))
    tab.wait_for_selector("#query .thumbnail-item, #query img")
    tab.click("#query .submit-button")
    tab.wait_for_selector("#hits .card")
    assert hits(tab)[0] == "words/003.png"
    opened(tab, 0)
    plain = tab.locator("#about img").get_attribute("src")
    tab.click("#why")
    tab.wait_for_selector("#generated")
    shot("why")
    heat = tab.locator("#about img")
    assert heat.get_attribute("src") != plain and heat.bounding_box()["width"] >= 250
    # What they can write is not asked for: after 40 steps the tokens don't hold a word to the letter.
    tab.click("#close")
    tab.wait_for_selector("#details", state="hidden")


def test_photographs_of_the_demo(gallery, new_tab):
    tab = new_tab(gallery)
    assert len(searched(tab, "a musical instrument")) == 30
    name = opened(tab, 0)
    tab.click("#why")
    tab.wait_for_selector("#generated")
    assert tab.locator("#about img").count() == 1 and tab.locator("#about .path").inner_text() == name
    save_shot(tab, "photographs")


def test_filters(tab):
    searched(tab, "red kitten")
    tab.locator("#filters button").first.click()
    tab.wait_for_selector("#kinds", state="visible")
    tab.evaluate("document.querySelector('#hits .grid').setAttribute('data-old', '')")
    tab.locator("#kinds label", has_text="PDF page").click()
    tab.wait_for_selector("#hits .grid:not([data-old]) .card")
    assert set(hits(tab)) == {"pages.pdf"} and len(hits(tab)) == 6


def test_a_broken_upload_is_an_error_and_not_the_end(tab, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    tab.set_input_files("#query input[type=file]", str(tmp_path / "broken.png"))
    tab.wait_for_selector("#query .thumbnail-item, #query img")
    tab.click("#query .submit-button")
    tab.wait_for_selector(".toast-body")
    said = tab.locator(".toast-wrap").inner_text()
    assert "PostScript" in said and "/tmp" not in said and "gradio" not in said


@pytest.mark.parametrize("path", ["outside.txt", "files/readme.txt", "index/search.json"])
def test_no_file_is_served(shop, path):
    address, _, root = shop
    with httpx.Client(trust_env=False) as client:
        for route in ("file=", "gradio_api/file=", "gradio_api/file/"):
            assert client.get(f"{address}{route}{root / path}").status_code >= 400, (route, path)
        assert client.get(f"{address}gradio_api/file={ROOT / 'README.md'}").status_code >= 400
