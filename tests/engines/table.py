"""The tables of docs/serve.md, drawn from docs/serve.json: `python -m tests.engines.table`.

A row is one way to compute vectors that somebody ran; rows of one engine and version replace each other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROWS, PAGE = ROOT / "docs" / "serve.json", ROOT / "docs" / "serve.md"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        table: `"engines"` or `"tools"`.
        name: Engine or tool.
        version: Its release.
        readout: `"mean"`, `"last"` or `"both"`.
        form: What was sent, or how it was used.
        result: Largest difference to sentence-transformers, or what happened instead.
    """

    table: str
    name: str
    version: str
    readout: str
    form: str
    result: str


def add(rows: list[Row]) -> None:
    """Put new rows in the place of all older ones of the same engines in the same table, and draw the tables again."""
    replaced = {(row.table, row.name, row.readout) for row in rows}
    kept = [row for row in read() if (row.table, row.name, row.readout) not in replaced]
    ordered = sorted([*kept, *rows], key=lambda row: (row.table, row.name.lower(), row.readout))
    ROWS.write_text(json.dumps([asdict(row) for row in ordered], indent=1) + "\n")
    draw()


def read() -> list[Row]:
    """All rows."""
    return [Row(**row) for row in json.loads(ROWS.read_text())] if ROWS.exists() else []


def lines(table: str) -> str:
    """One table as Markdown."""
    head = "| engine | version | readout | form | largest difference, or what happens |"
    if table == "tools":
        head = head.replace("engine", "tool")
    found = [row for row in read() if row.table == table]
    body = [f"| {row.name} | {row.version} | {row.readout} | {row.form} | {row.result} |" for row in found]
    return "\n".join([head, "|---|---|---|---|---|", *body])


def draw() -> None:
    """Write the tables between the markers of the page."""
    text = PAGE.read_text()
    for table in ("engines", "tools"):
        before, _, rest = text.partition(f"<!-- {table}: generated -->\n")
        _, _, after = rest.partition("<!-- end -->")
        text = f"{before}<!-- {table}: generated -->\n{lines(table)}\n<!-- end -->{after}"
    PAGE.write_text(text)


if __name__ == "__main__":
    draw()
