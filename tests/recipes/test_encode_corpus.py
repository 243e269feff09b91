"""Embedding a corpus: equal to `encode_document`, whole shards only, resuming, broken rows, no `st_btok`."""

from __future__ import annotations

import importlib
import sys

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from recipes import encode_corpus
from recipes.encode_corpus import EncodeConfig, encode_shard, open_corpus, plan, read_embeddings
from tests.mmeb_train_files import jpeg


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def corpus(tmp_path) -> str:
    images = [{"bytes": jpeg(i), "path": None} if i % 2 else None for i in range(11)]
    images[3] = {"bytes": jpeg(3)[:-60], "path": None}
    texts = [f"page {i}" if i != 6 else "" for i in range(11)]
    columns = {"id": [f"d{i}" for i in range(11)], "image": images, "text": texts}
    features = Features({"id": Value("string"), "image": Image(), "text": Value("string")})
    path = tmp_path / "corpus.parquet"
    Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return str(path)


def run(config, model, limit=None):
    table = open_corpus(config.corpus)
    shards = plan(config, len(table))[:limit]
    return [encode_shard(model, table, shard, "", config.batch_size) for shard in shards]


def test_shards_hold_what_encode_document_gives_and_name_broken_rows(corpus, tmp_path, qwen):
    config = EncodeConfig("m", [corpus], str(tmp_path / "out"), shard_size=4, batch_size=2)
    assert run(config, qwen) == [1, 1, 0]
    rows = list(read_embeddings(config.output))
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(11)]
    assert {row["id"]: bool(row["error"]) for row in rows if row["embedding"] is None} == {"d3": True, "d6": True}
    assert "truncated" in rows[3]["error"] and "empty" in rows[6]["error"]
    page = Image().decode_example({"bytes": jpeg(1), "path": None})
    expected = qwen.encode_document([{"text": "page 0"}, {"image": page, "text": "page 1"}])
    np.testing.assert_allclose([rows[0]["embedding"], rows[1]["embedding"]], expected, atol=1e-5)
    assert rows[0]["error"] == ""


def test_an_interrupted_run_goes_on_with_the_missing_shards(corpus, tmp_path, qwen, monkeypatch):
    config = EncodeConfig("m", [corpus], str(tmp_path / "out"), shard_size=4, batch_size=2)
    run(config, qwen, limit=1)
    first = (tmp_path / "out" / "shard-000000.parquet").stat().st_mtime_ns
    with monkeypatch.context() as patch:  # the machine goes down while a shard is written
        patch.setattr(encode_corpus.os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config, qwen)
    assert [path.name for path in sorted((tmp_path / "out").glob("*.parquet"))] == ["shard-000000.parquet"]
    assert len(run(config, qwen)) == 2 and run(config, qwen) == []
    assert (tmp_path / "out" / "shard-000000.parquet").stat().st_mtime_ns == first
    assert len(list(read_embeddings(config.output))) == 11


def test_shards_of_other_settings_are_not_mixed(corpus, tmp_path):
    plan(EncodeConfig("m", [corpus], str(tmp_path / "out")), 11)
    with pytest.raises(ValueError, match=r"\{'model': \('m', 'n'\)\}. Use another --output"):
        plan(EncodeConfig("n", [corpus], str(tmp_path / "out")), 11)


def test_a_corpus_needs_content(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"title": "a"}\n')
    with pytest.raises(ValueError, match="must have a column text, image or video"):
        open_corpus([str(path)])


def test_the_command_needs_no_st_btok(tmp_path, qwen, monkeypatch, capsys):
    qwen.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for name in [name for name in sys.modules if name.split(".")[0] == "st_btok"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.chdir(tmp_path)
    options = ["--model", "model", "--corpus", "c.jsonl", "--output", "out", "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["encode_corpus", *options])
    importlib.reload(encode_corpus).main()
    assert "1 shards written to out; 0 rows" in capsys.readouterr().out
    rows = list(read_embeddings(str(tmp_path / "out")))
    np.testing.assert_allclose([row["embedding"] for row in rows], qwen.encode_document(["one", "two"]), atol=1e-5)


@pytest.mark.slow
def test_ray_actors_write_the_same_shards(tmp_path, qwen):
    pytest.importorskip("ray", reason="needs the extra st_btok[ray]")
    from recipes.encode_corpus_ray import RayEncodeConfig, encode

    qwen.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(6)))
    config = RayEncodeConfig(str(tmp_path / "model"), [str(tmp_path / "c.jsonl")], str(tmp_path / "out"), shard_size=2)
    assert encode(config) == (3, 0) and encode(config) == (0, 0)
    rows = [row["embedding"] for row in read_embeddings(config.output)]
    np.testing.assert_allclose(rows, qwen.encode_document([f"row {i}" for i in range(6)]), atol=1e-5)
