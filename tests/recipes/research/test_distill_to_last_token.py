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
    for line, reason in {
        '{"title": "a"}': "can't be read: the row is empty",
        '{"text": "a",}': "line 2 of rows.jsonl is no JSON: a comma",
        '{"image": "gone.png"}': "gone.png' does not exist",
        '{"video": "a.mp4"}': "it has a video",
    }.items():
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match=f"row 2 of .*rows.jsonl .*{reason}"):
            distillation.read_rows(tmp_path / "rows.jsonl")


def test_rows_are_what_the_file_says(btok_model, tmp_path):
    """The order of keys, texts that name a picture, and what splits lines or is no text."""
    model, path = btok_model("qwen2_vl"), tmp_path / "rows.jsonl"
    shown = picture(56, 56)
    shown.save(tmp_path / "a.png")
    rows = [
        {"text": "x", "image": "a.png"}, {"image": "a.png", "text": "x"}, {"text": str(tmp_path / "a.png")},
        {"text": "a\u2028b"}, {"text": None, "image": "a.png"}, {"text": "y", "image": ""},
    ]  # fmt: skip
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n")
    found = distillation.read_rows(path)
    assert [list(row) for row in found] == [
        ["text", "image"], ["image", "text"], ["text"], ["text"], ["image"], ["text"],
    ]  # fmt: skip
    assert found[2:4] == rows[2:4]
    vectors = model.encode(found)
    expected = [{"text": "x", "image": shown}, {"image": shown, "text": "x"}, {"text": rows[2]["text"]}, "a\u2028b"]
    np.testing.assert_allclose(vectors, model.encode([*expected, shown, "y"]), atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3 < np.abs(vectors[2] - vectors[4]).max()


def test_the_copy_keeps_prompts_similarity_and_dimension(btok_model, tmp_path):
    model = btok_model("qwen2_vl")
    model.prompts, model.default_prompt_name = {"query": "Find: "}, "query"
    model.similarity_fn_name, model.truncate_dim = "dot", 8
    rows = [{"text": f"text number {i} of all"} for i in range(30)]
    wanted = model.encode(rows, truncate_dim=32)
    student, before, after = distillation.distil(model, rows, 12, 8, 1e-3)
    assert after.cosine > before.cosine, "trained on whole vectors, behind the prompt"
    student.save_pretrained(str(tmp_path / "last"))
    saved = SentenceTransformer(str(tmp_path / "last"), device="cpu")
    assert (saved.default_prompt_name, saved.similarity_fn_name, saved.truncate_dim) == ("query", "dot", 8)
    assert saved.encode(rows).shape == (30, 8)
    cosine = (saved.encode(rows, truncate_dim=32) * wanted).sum(1)
    assert cosine.mean() == pytest.approx(after.cosine, abs=0.02)
