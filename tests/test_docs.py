"""The pages of docs/: their Python runs, their links lead somewhere, and every public name is on one of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import st_btok
from st_btok import build_model
from st_btok.tools.command import COMMANDS
from tests.pages import PAGES, README, ROOT, blocks_of, furnish, run


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_blocks_run_in_order(page, tmp_path, monkeypatch):
    furnish(tmp_path, monkeypatch)
    build_model("tiny").save_pretrained("btok-vdr")  # what the README's training block leaves behind
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        run(block, name_of(page), names)


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_blocks_that_do_not_run_say_why(page):
    for rest in re.findall(r"^```python(.*)$", page.read_text(), re.MULTILINE):
        assert not rest or re.search(r'title="[^"]+"', rest), f"a block opens with ```python{rest}"


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.is_file(), f"{name_of(page)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}
            assert anchor in slugs, f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_files_and_modules_that_are_named_exist(page):
    """But for a file of an earlier commit, which the line names."""
    text = "\n".join(line for line in page.read_text().splitlines() if " commit " not in line)
    files = re.findall(r"`((?:st_btok|recipes|evaluation|tests|docs)/[\w./-]+\.\w+)`", text)
    modules = [
        name.replace(".", "/") for name in re.findall(r"python -m ((?:recipes|evaluation|tests|docs)[\w.]*\w)", text)
    ]
    places = [*files, *modules]
    missing = [
        place
        for place in places
        if not any((ROOT / name).is_file() for name in (place, f"{place}.py", f"{place}/__main__.py"))
    ]
    assert not missing


def test_every_public_name_and_command_is_documented():
    listed = re.findall(r"^::: st_btok\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = set(st_btok.__all__) - {"__version__"}
    assert not public - set(listed), f"docs/api.md needs a line `::: st_btok.NAME` for {sorted(public - set(listed))}"
    assert sorted(listed) == sorted(public)
    text = "\n".join(page.read_text() for page in [README, *PAGES])
    for command in COMMANDS:
        assert f"st-btok {command}" in text, command


def pages_of(menu: Any) -> list[str]:
    """The files of mkdocs' menu, whose entries are pages, titles with a page, or titles with a menu."""
    if isinstance(menu, str):
        return [menu]
    return [page for entry in (menu.values() if isinstance(menu, dict) else menu) for page in pages_of(entry)]


def test_troubleshooting_quotes_messages_that_exist():
    """Messages of other packages name their package; all others stand in our own code, as they are printed."""
    rooms = ("st_btok", "recipes", "evaluation")
    sources = [path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py")]
    code = re.sub(r"[\"']\s*\n\s*f?[\"']", "", "\n".join(sources))  # a literal that goes on in the next line
    table = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(quoted) >= 15
    missing = [text for text in quoted if text not in code]
    assert not missing


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(pages_of(menu))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    assert listed == {page for page in written if not page.startswith("results/")}, (
        "results/ holds what commands wrote"
    )
