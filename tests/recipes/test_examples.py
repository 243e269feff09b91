"""The example scripts run from top to bottom on a tiny model, and leave what they promise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from st_btok import build_model
from tests.backbones import build, picture
from tests.fake_engine import serving
from tests.pages import BACKBONE

EXAMPLES = Path(__file__).parents[2] / "recipes" / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "__init__.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a tiny backbone, a trained model and data."""
    monkeypatch.chdir(tmp_path)
    backbone, processor = build("qwen2_vl")
    backbone.save_pretrained("tiny")
    processor.save_pretrained("tiny")
    build_model("tiny").save_pretrained("btok-vdr")
    pages = [picture(56, 84, seed) for seed in range(4)]
    pages[0].save("report.pdf", save_all=True, append_images=pages[1:])
    rows = [{"query": f"question {number}", "positive": f"answer {number * 7}"} for number in range(20)]
    for name in ("pairs", "captions", "questions"):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    path = EXAMPLES / name
    monkeypatch.setattr("sys.argv", [str(path), *arguments])
    code = path.read_text().replace(BACKBONE, "tiny").replace("size=64", "size=8").replace("size=16", "size=8")
    exec(compile(code, str(path), "exec"), {"__name__": "__main__"})


def test_there_are_five_and_each_is_short():
    assert [path.stem for path in SCRIPTS] == ["lora", "own_pairs", "pages_of_a_pdf", "serving", "several_datasets"]
    for path in SCRIPTS:
        assert 20 <= len(path.read_text().splitlines()) <= 60, path.name


def test_own_pairs_are_scored_before_and_after(folder, monkeypatch, capsys):
    run("own_pairs.py", monkeypatch)
    printed = capsys.readouterr().out
    assert re.search(r"before: 0\.\d", printed) and re.search(r"after: 0\.\d", printed)
    assert SentenceTransformer("own-pairs/model").encode("a").shape == (32,)


def test_lora_trains_few_parameters_and_saves_them(folder, monkeypatch, capsys):
    run("lora.py", monkeypatch)
    whole = sum(parameter.numel() for parameter in build_model("tiny").parameters())
    trained = int(re.search(r"([\d,]+) parameters train", capsys.readouterr().out)[1].replace(",", ""))
    assert 0 < trained < whole
    assert SentenceTransformer("lora/model").encode("a").shape == (32,)


def test_pages_of_a_pdf_are_ranked(folder, monkeypatch, capsys):
    run("pages_of_a_pdf.py", monkeypatch)
    found = re.findall(r"^page (\d): (-?\d\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
    scores = [float(score) for _, score in found]
    assert len(found) == 3 and {number for number, _ in found} <= {"1", "2", "3", "4"}
    assert scores == sorted(scores, reverse=True)


def test_several_datasets_train_together(folder, monkeypatch):
    run("several_datasets.py", monkeypatch)
    assert SentenceTransformer("several/model").prompts["question"] == "Find the answer to: "


def test_a_served_model_gives_equal_vectors(folder, monkeypatch, capsys):
    run("serving.py", monkeypatch)
    with serving(SentenceTransformer("served")) as url:
        run("serving.py", monkeypatch, url)
    assert float(re.search(r"transformers: (\d\.\d+)", capsys.readouterr().out)[1]) == pytest.approx(1, abs=1e-5)
