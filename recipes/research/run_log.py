"""Finished runs, a line of JSON each: what was made is never made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """The finished runs, in a file.

    Args:
        path: The JSONL file; a torn last line (a kill while it was written) is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = ""
        for text in content.splitlines():
            try:
                self.lines.append(self.understood(json.loads(text)))
            except ValueError:
                continue
            whole += f"{text}\n"
        if whole != content:  # else it is left alone: another process may be adding to it
            path.write_text(whole, encoding="utf-8")

    def understood(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line as it is used here."""
        return line

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """The first line that has all of these values."""
        return next((line for line in self.lines if wanted.items() <= line.items()), None)

    def add(self, line: dict[str, Any]) -> None:
        """Write a finished run."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
