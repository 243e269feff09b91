"""The appendix of the findings holds the study's tables as they were written."""

from __future__ import annotations

import re

from recipes.study.appendix import PAGE, RESULTS, with_tables


def test_the_page_holds_the_tables_of_every_file():
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"<!-- tables: (\S+) -->", page))
    assert named == {str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.md")}
    assert with_tables(page, RESULTS) == page, "python -m recipes.study.appendix writes them"


def test_a_place_is_filled_anew(tmp_path):
    (tmp_path / "a.md").write_text("# one\n\n| 1 |\n")
    page = "before\n<!-- tables: a.md -->\nold\n<!-- /tables -->\nbehind"
    filled = with_tables(page, tmp_path)
    assert filled == "before\n<!-- tables: a.md -->\n## one\n\n| 1 |\n<!-- /tables -->\nbehind"
    assert with_tables(filled, tmp_path) == filled
