"""Every Python block of the README runs, in order, with small local models and data in the place of hub names."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.pages import README, blocks_of, furnish, run

TEXT = README.read_text()
BLOCKS = blocks_of(README)


@pytest.mark.slow
def test_blocks_run_as_written(tmp_path, monkeypatch, capsys):
    furnish(tmp_path, monkeypatch)
    first, *rest = BLOCKS
    run(first, "README", {})
    printed = numbers(capsys.readouterr().out)
    shown = numbers(re.search(r"^```\n(\(\d.*?)^```", TEXT, re.DOTALL | re.MULTILINE)[1])
    assert len(shown) == 2 + 9 and np.allclose(printed, shown, atol=1e-3), "README shows what its first block prints"

    use, checked, train = rest
    run(train, "README", {})
    assert (tmp_path / "btok-vdr" / "modules.json").exists()
    names: dict[str, object] = {}
    run(use, "README", names)
    similarities = numbers(capsys.readouterr().out.rsplit("tensor", 1)[-1])
    assert len(similarities) == 3 and np.all(np.abs(similarities) <= 1.001)
    run(checked, "README", names)
    printed = capsys.readouterr().out
    assert "SkippedInput(row=1" in printed and "(2, 32) [0, 2]" in printed


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_shell_commands_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)|`make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_it_is_short_and_answers_in_this_order():
    assert len(TEXT.split()) <= 1000, "what does not fit belongs in docs/"
    order = [
        "Should I use it?",
        "Install",
        "60 seconds on a CPU",
        "Train on your pairs",
        "Did it help?",
        "Use it",
        "Train in code",
        "Evaluate",
        "Questions",
        "Limits",
        "Citation",
    ]
    places = [TEXT.index(f"\n## {title}") for title in order]
    assert places == sorted(places)
