"""A hook of mkdocs: pages may link to files outside docs/ (results, figures, code), and the site carries them.

In the repository `../recipes/figures/explain.png` is where the file is, so the link works on the host's pages as well.
The site has no such place: every file that a page links to is added under `repository/`, and the link is turned there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)")


def outside(source: str, target: str) -> str | None:
    """Path from the repository's root of what a page links to, if it lies outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
    return None if path.startswith(("docs/", "../")) else path


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to."""
    for page in list(files.documentation_pages()):
        for _, target in LINK.findall(page.content_string):
            path = outside(page.src_uri, target)
            if path and (ROOT / path).is_file():
                place = place_of(path)
                if place not in files.src_uris:
                    files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site; Markdown as text, because its own links lead elsewhere."""
    return f"repository/{path}.txt" if path.endswith((".md", ".py")) else f"repository/{path}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to those files to where they lie."""

    def turned(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[2])
        start = posixpath.dirname(page.file.src_uri) or "."
        return match[0] if path is None else match[1] + posixpath.relpath(place_of(path), start)

    return LINK.sub(turned, markdown)
