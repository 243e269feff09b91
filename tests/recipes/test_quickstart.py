"""The quickstart on a few steps: table, equal embeddings in a process without st_btok, pictures."""

from __future__ import annotations

import sys

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from recipes import quickstart
from recipes.toy.quickstart import plain_embeddings


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--steps 2 --batch_size 4 --seeds 1 --max_candidates 80 --output_dir out"
    monkeypatch.setattr(sys, "argv", ["quickstart", *options.split()])
    quickstart.main()
    printed = capsys.readouterr().out
    assert "| image -> text | BToks |" in printed and "Largest difference" in printed
    assert "BToks, seed 0: 2 steps in" in printed and "{" not in printed, "a line for each training, no dictionaries"
    assert "BTokLoss" in (tmp_path / "out" / "README.md").read_text(), "the model card"
    for name in ("search.png", "comparison.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 300
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a line of text"]).shape == (1, 192)


def test_a_model_that_does_not_load_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="could not load"):
        plain_embeddings(tmp_path, ["a"])


@pytest.mark.parametrize(
    ("variants", "message"), [(["mean"], "variants must be of"), (["last token"], "must have BToks")]
)
def test_variants_that_make_no_model_are_refused(variants, message):
    with pytest.raises(ValueError, match=message):
        quickstart.QuickstartConfig(variants=variants)
