"""A folder of small files of every kind, and a model to index it with. Skipped where the extra `search` is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.backbones import picture

collect_ignore_glob = [] if find_spec("lancedb") and find_spec("gradio") and find_spec("qdrant_client") else ["test_*"]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "files"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "secret.txt").write_text("secret")
    for number in range(3):
        picture(56, 56, number).save(root / f"p{number}.png")
    (root / "sub" / "note.txt").write_text("What is the city?")
    (root / "long.md").write_text("red kitten\n\n" * 200)
    picture(56, 84).save(root / "report.pdf", save_all=True, append_images=[picture(56, 84, 7)])
    (root / "bad.png").write_bytes(b"no picture")
    (root / "program.exe").write_bytes(b"MZ")
    return root
