import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from recipes.research import distill_to_last_token, distillation
from tests.backbones import picture


def test_copy_comes_nearer_and_is_saved_for_engines(btok_model, tmp_path, capsys):
    btok_model("qwen2_vl").save_pretrained(str(tmp_path / "mean"))
    picture(56, 56).save(tmp_path / "a.png")
    rows = [{"text": f"text number {i} of all"} for i in range(38)] + [
        {"image": "a.png"},
        {"image": "a.png", "text": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    paths = [str(tmp_path / "mean"), str(tmp_path / "last"), "--data", str(tmp_path / "rows.jsonl")]
    distill_to_last_token.main([*paths, "--steps", "12", "--batch-size", "8", "--learning-rate", "1e-3"])
    before, after = (
        float(line.split("cosine ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()[-2:]
    )
    assert after > before
    saved = SentenceTransformer(str(tmp_path / "last"), device="cpu")
    assert [type(module).__name__ for module in saved] == ["Transformer", "Pooling", "Normalize"]
    assert not hasattr(saved[0].model.config, "io_processor_plugin")


def test_kept_neighbours_are_counted_by_hand():
    rng = np.random.default_rng(0)
    wanted = rng.standard_normal((40, 8))
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert distillation.compare(wanted, wanted, np.arange(5)) == distillation.Loss(pytest.approx(1.0), 1.0)
    assert distillation.compare(-wanted, wanted, np.arange(5)).kept == 1.0  # all turned: the same neighbours
    assert distillation.compare(-wanted, wanted, np.arange(5)).cosine == pytest.approx(-1.0)


def test_refusals(btok_model, tmp_path):
    with pytest.raises(ValueError, match="needs no conversion"):
        distillation.with_last_readout(btok_model("qwen2_vl", readout="last"))
    (tmp_path / "rows.jsonl").write_text('{"title": "a"}')
    with pytest.raises(ValueError, match="row 0"):
        distillation.read_rows(tmp_path / "rows.jsonl")
