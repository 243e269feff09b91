"""The Python blocks of README and docs, and a folder in which they run as written.

Names of the hub become paths of small local models and data; a GPU's options become the CPU's. A block whose fence
says more than `python` is not run, and the rest of its first line must be a title that says why not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Image

import evaluation.mini
from tests.backbones import build, picture

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BACKBONE = "Qwen/Qwen2-VL-2B-Instruct"


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def furnish(folder: Path, monkeypatch: Any) -> None:
    """Make `folder` the current one, with a backbone, pictures and a stand-in for data sets of the hub."""
    monkeypatch.chdir(folder)
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


def run(block: str, name: str, names: dict[str, Any]) -> None:
    """Execute one block; what it defines stays in `names`."""
    local = block.replace(BACKBONE, "tiny").replace("bf16=True", "bf16=True, use_cpu=True")
    local = local.replace('"recipes/backbone"', repr(str(ROOT / "recipes" / "backbone")))
    local = local.replace("test_size=100", "test_size=2")  # of a stand-in of eight rows
    exec(compile(local, name, "exec"), names)
