"""Walking through a folder: the same for corpora and for search."""

from __future__ import annotations

import os

import pytest

from recipes.data import corpus_records
from recipes.data.corpus_records import files_in


def test_files_come_by_name_without_what_is_hidden_or_linked(tmp_path):
    for name in ("b/2.txt", "a.txt", "c.txt", ".git/config", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "d.txt").symlink_to(tmp_path / "a.txt")
    assert [str(path.relative_to(tmp_path)) for path in files_in(tmp_path)] == ["a.txt", "b/2.txt", "c.txt", "d.txt"]


def test_a_folder_that_cannot_be_read_is_said_and_costs_no_other(tmp_path, monkeypatch):
    for name in ("a/1.txt", "b/2.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")

    def scandir(folder, real=os.scandir):
        if folder.name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(corpus_records.os, "scandir", scandir)
    refused = []
    assert [path.name for path in files_in(tmp_path, refused.append)] == ["2.txt"]
    assert [error.filename for error in refused] == [str(tmp_path / "a")]
    with pytest.raises(PermissionError):
        list(files_in(tmp_path))
