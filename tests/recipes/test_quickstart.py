"""The quickstart on a few steps: table, equal embeddings in a process without st_btok, pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from recipes import quickstart
from recipes.quickstart import Run


def test_comparison_shows_mean_spread_and_chance():
    def run(value):
        return Run(None, {"task": {"hit@1": value, "hit@10": 2 * value, "MRR": 3 * value}}, [])

    table = quickstart.comparison({"last token": [run(1.0), run(3.0)], "BToks": [run(5.0), run(5.0)]}, 4)
    assert "| task | last token | 2.0 ± 1.0 | 4.0 ± 2.0 | 6.0 ± 3.0 |" in table
    assert "| task | BToks | 5.0 ± 0.0 |" in table
    assert f"| any | chance | 25.0 | 100.0 | {100 * np.mean([1, 1 / 2, 1 / 3, 1 / 4]):.1f} |" in table


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--steps 2 --batch_size 4 --seeds 1 --max_candidates 80 --output out"
    monkeypatch.setattr(sys, "argv", ["quickstart", *options.split()])
    quickstart.main()
    printed = capsys.readouterr().out
    assert "| image -> text | BToks |" in printed and "Largest difference" in printed
    assert "BTokLoss" in (tmp_path / "out" / "README.md").read_text(), "the model card"
    for name in ("search.png", "loss.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 300
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a line of text"]).shape == (1, 192)


def test_a_model_that_does_not_load_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="could not load"):
        quickstart.plain_embeddings(tmp_path, ["a"])
