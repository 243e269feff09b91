"""Write the study's tables into `docs/findings_appendix.md`: `python -m recipes.study.appendix`.

The page has a place for every file of tables in `recipes/study/results`: `<!-- tables: PATH -->` opens it and
`<!-- /tables -->` closes it. What stands between is the file, its headings one level lower.
"""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "findings_appendix.md"
_PLACE = re.compile(r"(<!-- tables: (\S+) -->\n).*?(<!-- /tables -->)", re.DOTALL)


def with_tables(page: str, results: Path) -> str:
    """A page whose places hold the tables of their files.

    Args:
        page: Markdown with places.
        results: Folder that their paths start from.

    Returns:
        The page; what stood in the places is gone.
    """

    def filled(place: re.Match[str]) -> str:
        tables = (results / place[2]).read_text(encoding="utf-8").strip()
        return f"{place[1]}{re.sub('^#', '##', tables, flags=re.MULTILINE)}\n{place[3]}"

    return _PLACE.sub(filled, page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
