"""Every Python block of the README runs, in order, with small local models and data in the place of hub names."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from st_btok import BTokLoss
from tests.backbones import picture
from tests.pages import README, blocks_of, furnish, run

TEXT = README.read_text()
BLOCKS = blocks_of(README)


@pytest.mark.slow
def test_blocks_run_as_written(tmp_path, monkeypatch, capsys):
    furnish(tmp_path, monkeypatch)
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        assert len(block.splitlines()) <= 15
        run(block, "README", {})
    printed = capsys.readouterr().out
    assert "SkippedInput(row=2" in printed and "(3, 32) [0, 1, 3]" in printed
    assert re.search(r"mini-[\w.-]+ 0\.\d|mini-[\w.-]+ [01]", printed)
    assert (tmp_path / "btok-vdr" / "modules.json").exists()
    similarities = [float(x) for x in re.findall(r"-?\d\.\d{4}", printed)]
    assert np.all(np.abs(similarities) <= 1.001) and len(similarities) >= 4


def test_the_line_of_a_loop_of_ones_own_trains(qwen):
    line = re.search(r"`(loss = sum\(.*?)`", TEXT)[1]
    columns = (["a", "b"], [picture(56, 56, 1), picture(56, 56, 2)])
    names = {"BTokLoss": BTokLoss, "model": qwen, "features": [qwen.preprocess(column) for column in columns]}
    exec(line, names)
    names["loss"].backward()
    embeddings = qwen[0].model.get_input_embeddings().weight
    assert torch.isfinite(names["loss"]) and embeddings.grad.abs().max() > 0


def test_shell_commands_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)|`make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_it_is_short_and_says_what_is_needed_in_this_order():
    assert len(TEXT.split()) <= 1300, "what does not fit belongs in docs/"
    order = [
        "Install",
        "Build",
        "Train",
        "Encode",
        "Evaluate",
        "Options",
        "What a saved model can do",
        "Limits",
        "Where to",
    ]
    places = [TEXT.index(f"\n## {title}") for title in order]
    assert places == sorted(places)
