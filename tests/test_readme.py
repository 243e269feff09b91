"""Every Python block of the README runs, in order, with small local models and data in the place of hub names."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Image

import evaluation.mini
from tests.backbones import build, picture

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
def test_blocks_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    backbone, processor = build("qwen2_vl")
    backbone.save_pretrained("tiny")
    processor.save_pretrained("tiny")
    for name in ("page_1.png", "page_2.png"):
        picture(56, 84).save(name)
    picture(56, 84).save("report.pdf")
    rows = {
        "query": [f"question {i}" for i in range(8)],
        "image": [picture(56, 56, i) for i in range(8)],
        "extra": [0] * 8,
    }
    data = Dataset.from_dict(rows).cast_column("image", Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    whole = evaluation.mini.mini_benchmark
    monkeypatch.setattr(evaluation.mini, "mini_benchmark", lambda: list(whole())[:1])
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        assert len(block.splitlines()) <= 15
        local = block.replace("Qwen/Qwen2-VL-2B-Instruct", "tiny").replace("bf16=True", "bf16=True, use_cpu=True")
        exec(compile(local, "README", "exec"), {})
    printed = capsys.readouterr().out
    assert "SkippedInput(row=2" in printed and "(3, 32) [0, 1, 3]" in printed
    assert re.search(r"mini-[\w.-]+ 0\.\d|mini-[\w.-]+ [01]", printed)
    assert (tmp_path / "btok-vdr" / "modules.json").exists()
    similarities = [float(x) for x in re.findall(r"-?\d\.\d{4}", printed)]
    assert np.all(np.abs(similarities) <= 1.001) and len(similarities) >= 4


def test_shell_commands_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
