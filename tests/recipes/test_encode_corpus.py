"""Embedding a corpus: equal to `encode_document`, whole shards only, resuming, bad rows of every kind, none mixed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from sentence_transformers.util import quantize_embeddings

from evaluation.atomic_write import atomic_write
from recipes import encode_corpus
from recipes.bench.crash_test import kill_often, same_shards, start
from recipes.data import shards
from recipes.data.corpus import open_corpus
from recipes.data.shards import encode_shard, plan, read_embeddings
from recipes.encode_corpus import EncodeConfig
from tests.backbones import picture
from tests.mmeb_train_files import jpeg
from tests.st_btok.inputs.test_images import png_header


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


def config_for(tmp_path, *corpus, **options) -> EncodeConfig:
    return EncodeConfig("m", [str(path) for path in corpus], str(tmp_path / "out"), **{"shard_size": 4, **options})


def run(config, model, limit=None):
    corpus = open_corpus(config.data)
    return [encode_shard(model, corpus, shard, config) for shard in islice(plan(config, corpus, model), limit)]


def test_shards_hold_what_encode_document_gives_and_name_broken_rows(corpus, tmp_path, qwen):
    config = config_for(tmp_path, corpus)
    assert run(config, qwen) == [1, 1, 0]
    rows = list(read_embeddings(config.output_dir))
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(11)]
    assert {row["id"]: bool(row["error"]) for row in rows if row["embedding"] is None} == {"d3": True, "d6": True}
    assert "truncated" in rows[3]["error"] and "empty" in rows[6]["error"]
    page = Image().decode_example({"bytes": jpeg(1), "path": None})
    expected = qwen.encode_document([{"text": "page 0"}, {"image": page, "text": "page 1"}])
    np.testing.assert_allclose([rows[0]["embedding"], rows[1]["embedding"]], expected, atol=1e-5)
    assert rows[0]["error"] == ""


def test_every_form_of_a_corpus_gives_the_same_vectors(tmp_path, qwen):
    picture(56, 28, 1).save(tmp_path / "a.png")
    records = [{"id": "x", "text": "one", "image": "a.png"}, {"id": "y", "text": "two", "image": None}]
    table = Dataset.from_list(records)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n\n" for record in records))
    table.to_csv(str(tmp_path / "c.csv"), index=False)
    table.to_parquet(str(tmp_path / "c.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "a.png").write_bytes((tmp_path / "a.png").read_bytes())
    expected = qwen.encode_document([{"text": "one", "image": str(tmp_path / "a.png")}, "two"])
    reverse = qwen.encode_document([{"image": str(tmp_path / "a.png"), "text": "one"}])
    assert np.abs(expected[0] - reverse[0]).max() > 1e-3, "the order of the columns is the order of the input"
    for number, name in enumerate(("c.jsonl", "c.csv", "c.parquet", "saved")):
        config = EncodeConfig("m", [str(tmp_path / name)], str(tmp_path / f"out{number}"), shard_size=1)
        assert run(config, qwen) == [0, 0]
        rows = list(read_embeddings(config.output_dir))
        assert [row["id"] for row in rows] == ["x", "y"]
        np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5, err_msg=name)


def test_tables_as_excel_and_others_write_them(tmp_path, qwen):
    """A byte-order mark, a JSON list, binary texts and ids: the same ids and vectors."""
    (tmp_path / "c.csv").write_text("\ufeffid;text\r\n007;one\r\n8;5\r\n")
    (tmp_path / "c.jsonl").write_text('\ufeff{"id": "007", "text": "one"}\n{"id": 8, "text": 5}\n')
    (tmp_path / "c.json").write_text('\ufeff[{"id": "007", "text": "one"},\n {"id": "8", "text": "5"}]')
    pq.write_table(pa.table({"id": [b"007", b"8"], "text": [b"one", b"5"]}), tmp_path / "c.parquet")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "007").with_suffix(".txt").write_text("\ufeffone")
    expected = qwen.encode_document([{"text": "one"}, {"text": "5"}])
    for number, name in enumerate(("c.csv", "c.jsonl", "c.json", "c.parquet", "files")):
        config = EncodeConfig("m", [str(tmp_path / name)], str(tmp_path / f"out{number}"))
        assert run(config, qwen) == [0]
        rows = list(read_embeddings(config.output_dir))
        assert [row["id"] for row in rows] == (["007", "8"] if name != "files" else ["007.txt"])
        np.testing.assert_allclose([row["embedding"] for row in rows], expected[: len(rows)], atol=1e-5, err_msg=name)


def test_binary_that_is_no_text(tmp_path, qwen):
    columns = {"id": [b"\xff\x00", b"\xc3\xa4"], "text": [b"one", b"\xff"], "vector": [b"\xff", b"\xfe"]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    config = config_for(tmp_path, tmp_path / "c.parquet")
    assert run(config, qwen) == [1]
    rows = list(read_embeddings(config.output_dir))
    assert [row["id"] for row in rows] == ["ff00", "ä"] and "text must be UTF-8" in rows[1]["error"]


def test_a_folder_of_files(tmp_path, qwen):
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    picture(56, 28, 1).save(folder / "deep" / "a.png")
    (folder / "b.txt").write_text("words")
    (folder / "c.bin").write_bytes(b"\0")
    config = config_for(tmp_path, folder)
    assert run(config, qwen) == [1]
    rows = {row["id"]: row for row in read_embeddings(config.output_dir)}
    assert list(rows) == ["b.txt", "c.bin", "deep/a.png"] and "tells no image" in rows["c.bin"]["error"]
    np.testing.assert_allclose(rows["deep/a.png"]["embedding"], qwen.encode(picture(56, 28, 1)), atol=1e-5)


class Counting:
    """Counts how many records were asked of a corpus."""

    def __init__(self, records):
        self.records, self.read = records, 0

    def __call__(self, first):
        for record in self.records(first):
            self.read += 1
            yield record


def test_a_hub_data_set_is_streamed(tmp_path, qwen, monkeypatch):
    """All but the name is real: `datasets` streams a file, whose end only shows when it is read."""
    rows = {"id": [f"d{i}" for i in range(10)], "image": [{"bytes": jpeg(i), "path": None} for i in range(10)]}
    features = Features({"id": Value("string"), "image": Image()})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "hub.parquet"))
    asked = []

    def builder(name):
        asked.append(name)
        return datasets.load_dataset_builder("parquet", data_files={"part": str(tmp_path / "hub.parquet")})

    monkeypatch.setattr("recipes.data.corpus.load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("downloaded whole"))
    config = config_for(tmp_path, "someone/pages:part", shard_size=4)
    corpus = open_corpus(config.data)
    corpus._start = counting = Counting(corpus._start)
    assert corpus.num_rows is None and asked == ["someone/pages"]
    shards = plan(config, corpus, qwen)
    encode_shard(qwen, corpus, next(shards), config)
    assert counting.read <= 5, "a shard is all that was read"
    assert run(config, qwen) == [0, 0] and run(config, qwen) == []
    found = list(read_embeddings(config.output_dir))
    assert [row["id"] for row in found] == rows["id"]
    pages = [Image().decode_example({"bytes": jpeg(i), "path": None}) for i in range(10)]
    np.testing.assert_allclose([row["embedding"] for row in found], qwen.encode_document(pages), atol=1e-5)
    corpus = open_corpus(config.data)
    corpus._start = counting = Counting(corpus._start)
    assert not list(plan(config, corpus, qwen)) and not counting.read, "where it ends is known"
    digest = corpus.digest
    os.utime(tmp_path / "hub.parquet", (1, 1))  # on the hub: another revision
    assert open_corpus(config.data).digest != digest


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved", "folder"])
def test_a_corpus_read_in_order_is_read_once(tmp_path, kind):
    table = Dataset.from_dict({"text": [f"{i:02}" for i in range(30)]})
    if kind == "folder":
        (tmp_path / "folder").mkdir()
        for i in range(30):
            (tmp_path / "folder" / f"{i:02}.txt").write_text(f"{i:02}")
    elif kind == "saved":
        table.save_to_disk(str(tmp_path / kind))
    else:
        getattr(table, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[kind])(
            str(tmp_path / f"c.{kind}")
        )
    corpus = open_corpus([str(tmp_path / (kind if kind in ("folder", "saved") else f"c.{kind}"))])
    corpus._start = counting = Counting(corpus._start)
    assert corpus.num_rows == 30
    for first in (0, 7, 14, 24):
        expected = [f"{i:02}" for i in range(first, first + 5)]
        assert [record["text"] for record in corpus.records(first, first + 5)] == expected
    assert counting.read <= 30
    assert [record["text"] for record in corpus.records(3, 5)] == ["03", "04"], "backwards it begins anew"


def test_a_changed_picture_under_the_same_path_is_refused(tmp_path, qwen):
    """In every table that names it; its size and time count, so that nothing is read for it."""
    picture(28, 28, 1).save(tmp_path / "a.png")
    table = Dataset.from_dict({"image": ["a.png"], "text": ["one"]})
    table.to_json(str(tmp_path / "c.jsonl"))
    table.to_csv(str(tmp_path / "c.csv"), index=False)
    table.to_parquet(str(tmp_path / "c.parquet"))
    lists = Dataset.from_dict({"image": [["a.png", "a.png"]]})
    lists.to_parquet(str(tmp_path / "lists.parquet"))
    Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).save_to_disk(str(tmp_path / "saved"))
    struct = pa.table({"image": [{"bytes": None, "path": "a.png"}]})
    pq.write_table(struct, tmp_path / "struct.parquet")
    strings = pa.array(["a.png"])
    columns = {
        "dictionary": strings.dictionary_encode(),
        "view": strings.cast(pa.string_view()),
        "fixed": pa.FixedSizeListArray.from_arrays(pa.array(["a.png", "a.png"]), 2),
        "stored": pa.array([[{"bytes": None, "path": "a.png"}]]),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"image": column}), tmp_path / f"{name}.parquet")
    names = ["c.jsonl", "c.csv", "c.parquet", "lists.parquet", "struct.parquet", "saved"]
    names += [f"{name}.parquet" for name in columns]
    config = config_for(tmp_path, tmp_path / "c.jsonl")
    run(config, qwen)
    before = [open_corpus([str(tmp_path / name)]).digest for name in names]
    assert before == [open_corpus([str(tmp_path / name)]).digest for name in names]
    facts = (tmp_path / "a.png").stat()
    picture(28, 28, 2).save(tmp_path / "a.png")
    after = [open_corpus([str(tmp_path / name)]).digest for name in names]
    assert not set(before) & set(after)
    with pytest.raises(ValueError, match="there, now.: {'corpus'"):
        run(config, qwen)
    picture(28, 28, 1).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert run(config, qwen) == [], "the same picture with its time is the same corpus"


def test_files_of_several_folders_name_their_own_pictures(tmp_path, qwen):
    for number, name in enumerate(("first", "second/deep")):
        (tmp_path / name).mkdir(parents=True)
        picture(56, 28, number + 1).save(tmp_path / name / "a.png")
        table = Dataset.from_dict({"id": [name], "image": ["a.png"]})
        table.to_json(str(tmp_path / name / "c.jsonl"))
        table.to_csv(str(tmp_path / name / "c.csv"), index=False)
        table.to_parquet(str(tmp_path / name / "c.parquet"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "first")  # behind it, `..` is not the folder of the link
    expected = qwen.encode_document([{"image": picture(56, 28, number)} for number in (1, 2)])
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    for first in ("first", "elsewhere/link"):
        for suffix in ("jsonl", "csv", "parquet"):
            names = [tmp_path / first / f"c.{suffix}", tmp_path / "second" / "deep" / f"c.{suffix}"]
            config = EncodeConfig("m", list(map(str, names)), str(tmp_path / f"out {first} {suffix}"))
            assert run(config, qwen) == [0]
            rows = list(read_embeddings(config.output_dir))
            assert [row["id"] for row in rows] == ["first", "second/deep"]
            np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-5, err_msg=suffix)

    def digests(root):
        folders = root / "first", root / "second" / "deep"
        return [open_corpus([str(f / f"c.{s}") for f in folders]).digest for s in ("jsonl", "csv", "parquet")]

    before = digests(tmp_path)
    shutil.copytree(tmp_path, tmp_path.with_name("moved"), symlinks=True)  # with times
    assert digests(tmp_path.with_name("moved")) == before
    picture(56, 28, 3).save(tmp_path / "second" / "deep" / "a.png")
    assert not set(digests(tmp_path)) & set(before)


def test_shards_among_the_files_of_a_corpus_are_refused(tmp_path, qwen):
    """They would count as its files: rows would move, and the next start would find another corpus."""
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("words")
    for place in (folder, folder / "out", folder / "deep" / "out"):
        with pytest.raises(
            ValueError, match=r"must not lie in the folder whose files are the corpus.* \S+files/.embed"
        ):
            run(EncodeConfig("m", [str(folder)], str(place)), qwen)
        assert not (place / "corpus.json").exists()
    hidden = EncodeConfig("m", [str(folder)], str(folder / ".embeddings"))
    assert run(hidden, qwen) == [0] and run(hidden, qwen) == []
    Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "saved"))
    assert run(EncodeConfig("m", [str(tmp_path / "saved")], str(tmp_path / "saved" / "out")), qwen) == [0]


def test_an_empty_cell_names_no_file(tmp_path, qwen):
    """Or the corpus would be another one whenever a file comes into its folder."""
    (tmp_path / "c.csv").write_text("text,image\none,\ntwo,\n")
    config = config_for(tmp_path, tmp_path / "c.csv", shard_size=1)
    run(config, qwen, limit=1)
    (tmp_path / "new.txt").write_text("x")
    assert run(config, qwen) == [0]


def test_a_vector_that_is_not_finite_is_a_bad_row(tmp_path, qwen):
    """NaN in the embedding of a token that one of the texts has."""
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two Q"}\n{"text": "one two"}\n')
    ids = [set(qwen.tokenizer(text)["input_ids"]) for text in ("one two", "one two Q")]
    (alone,) = ids[1] - ids[0]
    with torch.no_grad():
        qwen[0].model.get_input_embeddings().weight[alone] = np.nan
    for precision in ("float32", "binary", "int8"):
        config = EncodeConfig("m", [str(tmp_path / "c.jsonl")], str(tmp_path / precision), precision=precision)
        assert run(config, qwen) == [1]
        rows = list(read_embeddings(config.output_dir))
        assert [row["embedding"] is None for row in rows] == [False, True, False]
        assert "vector with NaN or infinity" in rows[1]["error"] and not rows[0]["error"]


def test_int8_refuses_first_rows_that_are_equal(tmp_path, qwen, monkeypatch):
    monkeypatch.setattr(shards, "_CALIBRATION", 3)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n' * 3 + '{"text": "two"}\n{"text": "three"}\n')
    with pytest.raises(ValueError, match="among the first 3 rows, but 32 of 32 dimensions hold one value there"):
        run(config_for(tmp_path, tmp_path / "c.jsonl", precision="int8"), qwen)


def test_a_corpus_that_shrinks_while_it_is_embedded_is_an_error(tmp_path, qwen):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    config = config_for(tmp_path, path, shard_size=1)
    corpus = open_corpus(config.data)
    shards = plan(config, corpus, qwen)
    path.write_text('{"text": "one"}\n')
    encode_shard(qwen, corpus, next(shards), config)
    with pytest.raises(ValueError, match="must stay as it is while it is embedded: rows 1 to 2 .* 0 of them"):
        encode_shard(qwen, corpus, next(shards), config)


def test_no_row_ends_the_job(tmp_path, qwen):
    """What ended it before, and what a crawl holds."""
    (tmp_path / "bomb.png").write_bytes(png_header(50_000, 50_000))
    picture(56, 28, 1).save(tmp_path / "good.png")
    (tmp_path / "film.mp4").write_bytes(b"no film")
    PILImage.new("1", (1, 200_000)).save(tmp_path / "line.png")
    (tmp_path / "print.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nfilm.mp4\n")
    lines = {
        '{"id": "good", "text": "a"}': "",
        '{"image": "bomb.png"}': "too large|more than",
        '{"text": true}': "text must be a string, got bool",
        '{"image": ["good.png", "gone.png"]}': "gone.png' does not exist",
        '{"image": ["good.png", "good.png"]}': "",
        '{"id": "\\ud800", "text": "half \\ud800"}': "half a character",
        '{"video": "film.mp4"}': "can't be decoded as a video",
        '{"video": "list.m3u8"}': "can't be decoded as a video",
        '{"image": "print.eps"}': "PostScript",
        '{"image": "line.png"}': "",
        '{"image": 3}': "",
        '{"text": "cut': "no JSON",
        "[1]": "no JSON object",
        '{"title": "none"}': "empty",
        '{"image": "http://127.0.0.1/a.png"}': "not fetched",
        '{"text": {"a": 1}}': "text must be a string, got dict",
        '{"image": "a\\u0000b"}': "does not exist",
    }
    (tmp_path / "c.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    config = config_for(tmp_path, tmp_path / "c.jsonl", shard_size=100)
    run(config, qwen)
    rows = list(read_embeddings(config.output_dir))
    assert len(rows) == len(lines) + 1 and "not UTF-8" in rows[-1]["error"]
    for (line, reason), row in zip(lines.items(), rows, strict=False):
        good = line in ('{"id": "good", "text": "a"}',) or 'good.png", "good' in line or "line.png" in line
        assert (row["embedding"] is not None) == good, (line, row["error"])
        assert good or any(part in row["error"] for part in reason.split("|")), (line, row["error"])


def test_an_interrupted_run_goes_on_with_the_missing_shards(corpus, tmp_path, qwen, monkeypatch):
    config = config_for(tmp_path, corpus)
    run(config, qwen, limit=1)
    first = (tmp_path / "out" / "shard-000000.parquet").stat().st_mtime_ns
    with monkeypatch.context() as patch:  # the machine goes down while a shard is written
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config, qwen)
    assert [path.name for path in sorted((tmp_path / "out").glob("*.parquet*"))] == ["shard-000000.parquet"]
    assert len(run(config, qwen)) == 2 and run(config, qwen) == []
    assert (tmp_path / "out" / "shard-000000.parquet").stat().st_mtime_ns == first
    assert len(list(read_embeddings(config.output_dir))) == 11


def test_a_full_disk_leaves_nothing_and_killed_processes_are_cleaned_up_after(corpus, tmp_path, qwen, monkeypatch):
    config = config_for(tmp_path, corpus)

    def full(table, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.pq, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            run(config, qwen)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus.json"]
    host = shards.socket.gethostname()
    dead = tmp_path / "out" / f"shard-000001.parquet.{host}.999999999.unfinished"
    alive = tmp_path / "out" / f"shard-000002.parquet.{host}.1.unfinished"
    elsewhere = tmp_path / "out" / "shard-000002.parquet.other.999999999.unfinished"
    for path in (dead, alive, elsewhere):
        path.write_bytes(b"half")
    run(config, qwen)
    assert not dead.exists() and alive.exists() and elsewhere.exists()


def test_another_corpus_model_or_setting_is_refused(tmp_path, qwen, btok_model):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n')
    config = config_for(tmp_path, path)
    run(config, qwen)
    moved = tmp_path / "moved.jsonl"
    moved.write_text('{"text": "one"}\n')
    assert run(config_for(tmp_path, moved), qwen) == [], "the content counts, not the place"
    with pytest.raises(ValueError, match="'truncate_dim': .None, 8.}. Use another --output"):
        run(config_for(tmp_path, path, truncate_dim=8), qwen)
    path.write_text('{"text": "two"}\n')
    with pytest.raises(ValueError, match="there, now.: {'corpus'"):
        run(config, qwen)
    path.write_text('{"text": "one"}\n')
    qwen[0].model.get_input_embeddings().weight.data.mul_(1.1)
    with pytest.raises(ValueError, match="there, now.: {'model'"):
        run(config, qwen)


@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary"])
def test_small_vectors(tmp_path, qwen, precision):
    texts = [f"row {number}" for number in range(9)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(config_for(tmp_path, path, precision=precision, truncate_dim=8), qwen)
    rows = [row["embedding"] for row in read_embeddings(str(tmp_path / "out"))]
    expected = quantize_embeddings(qwen.encode_document(texts, truncate_dim=8), precision)
    assert np.abs(np.array(rows) - expected.astype(int)).max() <= (1 if precision == "int8" else 0), "over shards"


def test_what_is_no_corpus(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"title": "a"}\n')
    with pytest.raises(ValueError, match="must have a column text, image or video"):
        open_corpus([str(tmp_path / "c.jsonl")])
    (tmp_path / "lines.jsonl").write_text('{"text": "a",}\n{"text": "b",}\n')
    with pytest.raises(ValueError, match="no row that can be read: line 1 of lines.jsonl is no JSON: a comma"):
        open_corpus([str(tmp_path / "lines.jsonl")])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="torn.parquet is no Parquet file"):
        open_corpus([str(tmp_path / "torn.parquet")])
    with pytest.raises(ValueError, match="missing: .*gone.jsonl"):
        open_corpus([str(tmp_path / "c.jsonl"), "gone.jsonl"])
    with pytest.raises(ValueError, match="there is no file or folder 'gone.jsonl'"):
        open_corpus(["gone.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        open_corpus([str(tmp_path / "empty")])


@pytest.fixture
def folders(tmp_path, qwen):
    """A corpus of 120 shards, an unbroken run of it, and a folder for the runs that are killed."""
    rows = [{"id": f"d{i}", "text": f"row {i} " * (i % 7 + 1)} for i in range(480)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = EncodeConfig("m", [str(tmp_path / "c.jsonl")], str(tmp_path / "whole"), shard_size=4)
    torch.set_num_threads(1)  # forked processes have no threads of their own pool
    begun = time.monotonic()
    run(whole, qwen)
    return whole, dataclasses.replace(whole, output_dir=str(tmp_path / "broken")), time.monotonic() - begun


@pytest.mark.parametrize("together", [1, 2])
def test_killed_jobs_leave_what_an_unbroken_one_does(folders, qwen, together):
    """Real processes, real kills at random times; 20 of them: `python -m recipes.bench crash_test`.

    Each kill is due within an eighth of the work, so that one which a busy machine delays still finds its job running.
    """
    whole, broken, seconds = folders
    hit, written = kill_often(broken, qwen, kills=2, together=together, startup=seconds / 16, work=seconds / 16)
    assert hit == 2 and written < 120
    assert same_shards(Path(broken.output_dir), Path(whole.output_dir)) == 120


def test_two_processes_share_a_folder(folders, qwen):
    """Both write the whole corpus; shards are written whole, whoever is last."""
    whole, broken, _ = folders
    jobs = [start(broken, qwen) for _ in range(2)]
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert same_shards(Path(broken.output_dir), Path(whole.output_dir)) == 120


def test_of_two_jobs_with_other_settings_in_a_folder_the_first_wins(tmp_path):
    """Both see no manifest; whoever comes second finds the first's, and refuses."""
    place = tmp_path / "corpus.json"
    atomic_write(place, lambda path: path.write_text("first"), replace=False)
    atomic_write(place, lambda path: path.write_text("second"), replace=False)
    assert place.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


def test_the_command(tmp_path, qwen, monkeypatch, capsys):
    qwen.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "c.jsonl").write_text('{"id": 1, "text": "one"}\n{"text": "two", "img": "two.png"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--model", "model", "--corpus", "c.jsonl", "--output", "out"])
    encode_corpus.main()
    out = capsys.readouterr().out
    assert "1 shards written to out; 0 rows" in out and "image nor video were not embedded: img." in out
    rows = list(read_embeddings(str(tmp_path / "out")))
    np.testing.assert_allclose([row["embedding"] for row in rows], qwen.encode_document(["one", "two"]), atol=1e-5)


def test_the_command_says_a_users_mistake_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text('[{"text": "one",}]')
    monkeypatch.setattr(sys, "argv", ["x", "--model", "gone", "--corpus", str(tmp_path / "c.json"), "--output", "out"])
    with pytest.raises(SystemExit, match="^st_btok: c.json is no JSON list in line 1: a comma stands before"):
        encode_corpus.main()


@pytest.mark.slow
def test_ray_actors_write_the_same_shards_though_one_is_killed(tmp_path, qwen):
    ray = pytest.importorskip("ray", reason="needs the extra st_btok[ray]")
    psutil = pytest.importorskip("psutil")
    from recipes.data.ray_shards import encode
    from recipes.encode_corpus_ray import RayEncodeConfig

    qwen.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(40)))
    config = RayEncodeConfig(
        str(tmp_path / "model"), [str(tmp_path / "c.jsonl")], str(tmp_path / "out"), shard_size=1, actors=2
    )
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    killed, done = [], threading.Event()

    def kill_one():
        while not killed and not done.is_set():  # a busy machine takes minutes to start the actors
            time.sleep(0.02)
            if list((tmp_path / "out").glob("shard-*.parquet")):
                workers = [
                    p for p in psutil.process_iter(["cmdline"]) if "ray::Map" in " ".join(p.info["cmdline"] or [])
                ]
                for worker in workers[:1]:
                    os.kill(worker.pid, signal.SIGKILL)
                    killed.append(worker.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        assert encode(config) == (40, 0) and encode(config) == (0, 0)
    finally:
        done.set()
        killer.join()
        ray.shutdown()
    assert killed
    rows = [row["embedding"] for row in read_embeddings(config.output_dir)]
    np.testing.assert_allclose(rows, qwen.encode_document([f"row {i}" for i in range(40)]), atol=1e-5)
