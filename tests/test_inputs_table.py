"""docs/inputs.md says what happens; error texts of other libraries may change with their version."""

from __future__ import annotations

from pathlib import Path

from tests.inputs_table import table


def outcomes(page: str) -> list[tuple[str, str]]:
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    return [(row[1].strip(), row[-2].split(":")[0].split(",")[0].strip()) for row in rows]


def test_the_table_in_docs_is_what_happens():
    assert outcomes(Path("docs/inputs.md").read_text()) == outcomes(table())
