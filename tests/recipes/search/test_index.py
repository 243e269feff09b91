"""The index follows its folder; what is found equals a search by hand over plain `encode`; kills lose nothing."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from qdrant_client import QdrantClient, models
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from recipes.data import corpus_records
from recipes.search import __main__ as command
from recipes.search import commands
from recipes.search import folder as folder_module
from recipes.search import index as module
from recipes.search.index import one_writer, open_index, update
from recipes.search.lookup import find, line, query_of, spread
from recipes.search.qdrant_store import QdrantStore
from recipes.search.store import LanceStore
from tests.backbones import build, picture

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["lance", "qdrant"])
def store(request, tmp_path, qwen, folder):
    if request.param == "lance":
        return LanceStore(str(tmp_path / "lance"), 32)
    return QdrantStore(QdrantClient(":memory:"), "items", qwen, folder)


def indexed(store, qwen, folder, **options):
    return update(store, qwen, folder, batch_size=2, progress=False, **options)


def test_hits_equal_a_search_by_hand(store, qwen, folder):
    report = indexed(store, qwen, folder)
    assert report.new == 6 and list(report.left_out) == ["bad.png"] and "is not an image" in report.left_out["bad.png"]
    pictures = [Image.open(folder / f"p{number}.png").convert("RGB") for number in range(3)]
    plain = qwen.encode_document([*pictures, "What is the city?"])
    query = qwen.encode_query(["red kitten"])[0]
    expected = dict(zip(["p0.png", "p1.png", "p2.png", "sub/note.txt"], plain @ query, strict=True))
    hits = find(store, qwen, "red kitten", 20)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    found = {hit.row["path"]: hit.score for hit in hits if hit.row["path"] in expected}
    assert found == pytest.approx(expected, abs=1e-5)
    assert store.count() == len(hits) == 9 and "long.md line " in "".join(map(line, hits))


def test_a_bad_page_or_row_never_loses_its_neighbours(store, qwen, folder):
    pypdfium2 = pytest.importorskip("pypdfium2")
    document = pypdfium2.PdfDocument.new()
    for side in (100, 14_000, 102):
        document.new_page(side, side)
    document.save(str(folder / "three.pdf"))
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b",}\n{"image": "bad.png"}\n{"text": "d"}\n')
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("a")
    report = indexed(store, qwen, folder)
    assert list(report.left_out) == [
        "bad.png", "caf\\xe9.txt", "rows.jsonl, row 2", "rows.jsonl, row 3", "three.pdf, page 2",
    ]  # fmt: skip
    assert report.suffixes == {".exe": 1}
    places = {hit.row["place"] for hit in find(store, qwen, query_of("a", None), 30) if "r" in hit.row["path"][0]}
    places |= {hit.row["place"] for hit in find(store, qwen, query_of("a", None), 30, path="three")}
    assert {"row 1", "row 4", "page 1", "page 3"} <= places and not {"row 2", "row 3"} & places
    text = commands.report_text(report, store.count())
    assert (
        "1 files of kinds that can't be searched: 1 .exe" in text and "left out: three.pdf, page 2: page 2 of" in text
    )
    again = indexed(store, qwen, folder)
    assert not again.written and again.deleted == 0


def test_rows_of_what_cannot_be_read_today_stay(store, qwen, folder, monkeypatch):
    indexed(store, qwen, folder)
    count = store.count()
    hashed = folder_module.file_hash

    def refuse(path):
        if path.name == "note.txt":
            raise PermissionError(13, "Permission denied")
        return hashed(path)

    (folder / "sub" / "note.txt").touch()
    monkeypatch.setattr(folder_module, "file_hash", refuse)
    report = indexed(store, qwen, folder)
    assert report.left_out["sub/note.txt"] == "it can't be read: Permission denied"
    assert report.deleted == 0 and store.count() == count


def test_a_folder_that_is_not_there_never_empties_its_index(store, qwen, folder, monkeypatch):
    """A disk that is not mounted: no folder, an empty one in its place, or one that gives no names."""
    indexed(store, qwen, folder)
    count = store.count()
    away = folder.rename(folder.with_name("away"))
    with pytest.raises(ValueError, match=r"there is no folder or table '.*files'. Check the path"):
        indexed(store, qwen, folder)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"files holds nothing that can be searched, the index 6 files of it; none"):
        indexed(store, qwen, folder)

    def refuse(path):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(corpus_records.os, "scandir", refuse)
        with pytest.raises(ValueError, match=r"the folder .*files can't be read: Input/output error"):
            indexed(store, qwen, folder)
    assert store.count() == count
    folder.rmdir()
    away.rename(folder)
    assert indexed(store, qwen, folder).unchanged == 6


def test_a_table_that_is_not_there_never_empties_its_index(tmp_path, qwen):
    table = tmp_path / "rows.jsonl"
    table.write_text('{"text": "a"}\n')
    store, root = open_index(tmp_path / "index", qwen, table)
    update(store, qwen, root, progress=False)
    table.unlink()
    with pytest.raises(ValueError, match="there is no folder or table '.*rows.jsonl'"):
        update(store, qwen, root, progress=False)
    assert store.count() == 1
    with pytest.raises(ValueError, match="there is no folder or table '.*typo'"):
        open_index(tmp_path / "other", qwen, tmp_path / "typo")
    assert not (tmp_path / "other").exists(), "the right folder can still be indexed there"


def test_an_index_among_the_files_that_it_indexes_is_refused(tmp_path, qwen, folder):
    for place in (folder, folder / "index", folder / "sub" / "index"):
        with pytest.raises(ValueError, match="must not lie in the folder that is indexed.*such as .*files/.index"):
            open_index(place, qwen, folder)
    store, root = open_index(folder / ".index", qwen, folder)
    assert indexed(store, qwen, root).new == 6 and indexed(store, qwen, root).new == 0
    table = folder / "rows.jsonl"
    table.write_text('{"text": "a"}\n')
    open_index(folder / "index", qwen, table)  # of a table nothing else is listed


def test_a_vector_that_is_not_finite_is_never_stored_or_searched_with(store, qwen, folder, monkeypatch):
    encode = module.encode_checked

    def broken(model, values, *args, **options):
        result = encode(model, values, *args, **options)
        for row, vector in zip(result.rows, result.embeddings, strict=True):
            if values[row].get("text") == "What is the city?":
                vector[3] = np.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_checked", broken)
        report = indexed(store, qwen, folder)
    assert "vector with NaN" in report.left_out["sub/note.txt, line 1"] and store.count() == 8
    assert indexed(store, qwen, folder).new == 1 and store.count() == 9
    with torch.no_grad():
        qwen[0].model.get_input_embeddings().weight.fill_(np.nan)
    with pytest.raises(ValueError, match="can't be searched with: .*NaN"):
        find(store, qwen, query_of("a", None))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_picture_that_a_table_names_is_embedded_again_when_it_changes(store, qwen, folder, suffix):
    (folder / "pages").mkdir()
    (folder / "pages" / "a.tiff").write_bytes(b"")
    rows = [{"text": "one", "image": "pages/a.tiff"}, {"text": "two", "image": None}, {"text": "four", "image": ""}]
    Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    Dataset.from_list(rows).to_json(str(folder / "rows.jsonl"))
    (folder / f"rows.{'jsonl' if suffix == 'parquet' else 'parquet'}").unlink()
    (folder / "words.jsonl").write_text('{"text": "three"}\n')
    picture(56, 56, 1).save(folder / "pages" / "a.tiff")
    indexed(store, qwen, folder)
    (folder / "more.txt").write_text("a file more changes the folder, and no picture")
    report = indexed(store, qwen, folder)
    assert (report.new, report.changed, report.unchanged) == (1, 0, 9)
    assert len(store.files()["words.jsonl"]["content"]) == 64, "as in indexes that were made before media counted"
    picture(56, 56, 2).save(folder / "pages" / "a.tiff")
    assert indexed(store, qwen, folder).changed == 2
    expected = qwen.encode_document([{"text": "one", "image": picture(56, 56, 2)}])[0]
    (hit,) = find(store, qwen, query_of("one", None), 9, ["image"], "rows")
    np.testing.assert_allclose(store.vector(hit.row["id"]), expected, atol=1e-5)
    (folder / "pages" / "a.tiff").unlink()
    report = indexed(store, qwen, folder)
    assert "does not exist" in report.left_out[f"rows.{suffix}, row 1"]
    assert [hit.row["place"] for hit in find(store, qwen, query_of("one", None), 9, path="rows")] != ["row 1"]
    assert not find(store, qwen, query_of("one", None), 9, ["image"], "rows")


def test_random_pairs_tell_what_a_similarity_means(store):
    rng = np.random.default_rng(0)
    row = {"kind": "text", "place": "", "text": "", "content": "", "last": 1, "size": 1, "changed": 1, "part": 0}
    assert spread(store) is None
    vectors = rng.standard_normal((40, 32)).astype("float32")
    vectors[20:] = vectors[:20]  # twins in the same file do not count
    rows = [{**row, "id": f"{i:032x}", "path": str(i % 20), "thumbnail": b""} for i in range(40)]
    store.add(rows, vectors)
    unit = vectors[:20] / np.linalg.norm(vectors[:20], axis=1, keepdims=True)
    truth = (unit @ unit.T)[np.triu_indices(20, 1)]
    found = spread(store)
    assert found.median == pytest.approx(np.median(truth), abs=1e-5) and not found.warning
    assert found.high == pytest.approx(np.quantile(np.repeat(truth, 4), 0.95), abs=1e-5)
    store.remove([str(i) for i in range(20)])
    store.add(rows, vectors + 50)
    assert "hardly tells these files apart" in spread(store).warning
    assert "hardly tells" in commands.report_text(module.Report(), 40, spread(store))


def test_a_sample_is_spread_over_a_large_table(store):
    row = {"kind": "text", "place": "", "text": "", "content": "", "last": 1, "size": 1, "changed": 1, "part": 0}
    rows = [{**row, "id": f"{i:032x}", "path": str(i), "thumbnail": b""} for i in range(500)]
    store.add(rows, np.random.default_rng(0).standard_normal((500, 32)).astype("float32"))
    paths = [int(path) for path, _ in store.sample(50)]
    assert len(set(paths)) == 50 and min(paths) < 125 and max(paths) > 375


def test_filters_by_kind_and_path(store, qwen, folder):
    indexed(store, qwen, folder)
    assert {hit.row["kind"] for hit in find(store, qwen, "a", 20, ["page", "text"])} == {"page", "text"}
    assert [hit.row["path"] for hit in find(store, qwen, "a", 20, path="sub/")] == ["sub/note.txt"]
    assert find(store, qwen, "a", 20, path="it's nowhere") == []


def test_a_picture_finds_itself_and_its_stored_vector_too(store, qwen, folder):
    indexed(store, qwen, folder)
    hits = find(store, qwen, query_of(None, folder / "p1.png"), 3)
    assert hits[0].row["path"] == "p1.png" and hits[0].score == pytest.approx(1, abs=1e-5)
    again = store.search(store.vector(hits[0].row["id"]), 1)
    assert again[0].row["id"] == hits[0].row["id"]
    thumbnail = Image.open(io.BytesIO(hits[0].row["thumbnail"]))
    assert thumbnail.size == (56, 56)
    with pytest.raises(KeyError, match="no row"):
        store.vector("0" * 32)


def test_only_what_changed_is_embedded_again(store, qwen, folder, monkeypatch):
    indexed(store, qwen, folder)
    (folder / "bad.png").unlink()
    read = []
    encode = module.encode_checked
    monkeypatch.setattr(
        module, "encode_checked", lambda model, values, *a, **k: read.extend(values) or encode(model, values, *a, **k)
    )
    report = indexed(store, qwen, folder)
    assert read == [] and (report.unchanged, report.new, report.changed, report.deleted) == (6, 0, 0, 0)
    (folder / "sub" / "note.txt").write_text("another text")
    (folder / "new.txt").write_text("new")
    (folder / "p0.png").unlink()
    report = indexed(store, qwen, folder)
    assert sorted(value["text"] for value in read) == ["another text", "new"]
    assert (report.unchanged, report.new, report.changed, report.deleted) == (4, 1, 1, 1)
    assert {hit.row["path"] for hit in find(store, qwen, "a", 20)} == {
        "long.md", "new.txt", "p1.png", "p2.png", "report.pdf", "sub/note.txt",
    }  # fmt: skip


def test_a_run_that_was_cut_short_goes_on_with_the_missing_parts(store, qwen, folder, monkeypatch):
    (folder / "bad.png").unlink()
    add, added = store.add, []

    def cut(rows, vectors):
        if added:
            raise KeyboardInterrupt
        added.append(len(rows))
        add(rows, vectors)

    monkeypatch.setattr(store, "add", cut)
    monkeypatch.setattr(module, "_BATCHES_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        indexed(store, qwen, folder)
    assert store.count() == added[0] == 2  # two passages of the three of long.md
    monkeypatch.setattr(store, "add", add)
    read = []
    encode = module.encode_checked
    monkeypatch.setattr(
        module, "encode_checked", lambda model, values, *a, **k: read.extend(values) or encode(model, values, *a, **k)
    )
    indexed(store, qwen, folder)
    assert store.count() == 9 and len(read) == 7
    assert all(entry["whole"] for entry in store.files().values())


def test_above_a_number_of_rows_there_is_an_index_and_its_recall(tmp_path, monkeypatch):
    store = LanceStore(str(tmp_path / "lance"), 16)
    vectors = np.random.default_rng(0).standard_normal((600, 16)).astype("float32")
    row = {"path": "a", "kind": "text", "place": "", "text": "", "content": "", "last": 0, "size": 1, "changed": 1}
    rows = [{**row, "id": f"{i:032x}", "part": i, "thumbnail": b""} for i in range(600)]
    store.add(rows, vectors)
    assert store.finish(600) is None and not store.table.list_indices()
    recall = store.finish(599)
    assert store.table.list_indices() and 0.9 <= recall <= 1
    truth = np.argsort(-(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) @ vectors[3])[:5]
    assert [int(hit.row["id"], 16) for hit in store.search(vectors[3], 5)] == truth.tolist()


def test_half_precision_takes_half_and_stays_close(tmp_path, qwen, folder):
    whole, half = LanceStore(str(tmp_path / "a"), 32), LanceStore(str(tmp_path / "b"), 32, half=True)
    indexed(whole, qwen, folder)
    indexed(half, qwen, folder)
    scores = [[hit.score for hit in find(store, qwen, "a", 20)] for store in (whole, half)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3) and scores[0] != scores[1]
    with pytest.raises(ValueError, match="holds vectors of type"):
        LanceStore(str(tmp_path / "a"), 32, half=True)


def test_another_model_or_folder_is_refused(tmp_path, qwen, folder):
    with pytest.raises(ValueError, match="holds no index"):
        open_index(tmp_path / "index", qwen)
    open_index(tmp_path / "index", qwen, folder)
    with pytest.raises(ValueError, match="is of .*, not of"):
        open_index(tmp_path / "index", qwen, folder / "sub")
    with torch.no_grad():
        qwen[0].model.get_input_embeddings().weight[5] += 1
    with pytest.raises(ValueError, match="made with another model"):
        open_index(tmp_path / "index", qwen)


def test_another_model_or_folder_of_a_collection_is_refused(tmp_path, qwen, folder):
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    with pytest.raises(ValueError, match="no collection 'files'. Pass the folder"):
        QdrantStore(client, "files", qwen)
    update(QdrantStore(client, "files", qwen, folder), qwen, folder, progress=False)
    client.close()
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    again = QdrantStore(client, "files", qwen)
    assert again.folder == folder.resolve() and again.count() == 9
    with pytest.raises(ValueError, match="is of .*files, not of"):
        QdrantStore(client, "files", qwen, tmp_path)
    with torch.no_grad():
        qwen[0].model.get_input_embeddings().weight[5] += 1
    with pytest.raises(ValueError, match="made with another model"):
        QdrantStore(client, "files", qwen, folder)
    client.create_collection("old", models.VectorParams(size=32, distance=models.Distance.COSINE))
    with pytest.raises(ValueError, match="does not say which model and folder"):
        QdrantStore(client, "old", qwen, folder)


def test_a_model_that_is_no_btok_model(tmp_path, folder):
    backbone, tokenizer = build("llama")
    backbone.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    transformer = Transformer(str(tmp_path / "llama"))
    plain = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    store, root = open_index(tmp_path / "index", plain, folder)
    report = update(store, plain, root, progress=False)
    assert find(store, plain, "What is the city?", 1)[0].row["path"] == "sub/note.txt"
    assert {"p0.png", "report.pdf, page 1"} <= report.left_out.keys()  # it takes no pictures, and says so


def test_two_writers(tmp_path):
    with one_writer(tmp_path / "index"), pytest.raises(ValueError, match="another process is writing"):
        with one_writer(tmp_path / "index"):
            pass
    with one_writer(tmp_path / "index"):
        pass


def test_the_command_survives_kills(tmp_path, qwen, folder, capsys):
    (folder / "bad.png").unlink()
    for number in range(16):
        picture(56, 56, number + 20).save(folder / f"q{number:02}.png")
    qwen.save_pretrained(str(tmp_path / "model"))
    options = [
        "index",
        str(folder),
        "--to",
        str(tmp_path / "index"),
        "--model",
        str(tmp_path / "model"),
        "--batch_size",
        "1",
    ]
    arguments = [sys.executable, "-m", "recipes.search", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    versions = tmp_path / "index" / "lance" / "items.lance" / "data"
    while process.poll() is None and not (versions.exists() and any(versions.iterdir())):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    command.main(options)
    out = capsys.readouterr().out
    assert "25 items" in out
    store, _ = open_index(tmp_path / "index", qwen)
    assert all(entry["whole"] for entry in store.files().values()) and len(store.files()) == 22
    ids = [row["id"] for row in store.table.search().select(["id"]).to_list()]
    assert len(set(ids)) == len(ids) == 25
    command.main(
        ["query", str(tmp_path / "index"), "What is the city?", "--model", str(tmp_path / "model"), "--limit", "3"]
    )
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit, match="2"):
        command.main(["query", str(tmp_path / "index"), "--model", str(tmp_path / "model")])
    assert "give a text" in capsys.readouterr().err


def test_a_video_is_indexed_with_the_frame_in_its_middle(tmp_path, qwen):
    av = pytest.importorskip("av")
    root = tmp_path / "clips"
    root.mkdir()
    with av.open(str(root / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 56
        for number in range(9):
            frame = np.full((56, 56, 3), 255 if number in (3, 4, 5) else 0, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    store = LanceStore(str(tmp_path / "lance"), 32)
    report = update(store, qwen, root, progress=False)
    (hit,) = find(store, qwen, "a", 5, ["video"])
    assert hit.row["path"] == "clip.mp4" and not report.left_out
    thumbnail = Image.open(io.BytesIO(hit.row["thumbnail"]))
    assert thumbnail.size == (56, 56) and np.asarray(thumbnail).mean() > 128


def test_fewer_dimensions(tmp_path, qwen, folder, capsys):
    qwen.save_pretrained(str(tmp_path / "model"))
    rest = ["--model", str(tmp_path / "model")]
    command.main(["index", str(folder), "--to", str(tmp_path / "index"), *rest, "--truncate_dim", "16"])
    capsys.readouterr()
    command.main(["query", str(tmp_path / "index"), "What is the city?", *rest, "--truncate_dim", "16", "--json"])
    assert '"sub/note.txt"' in capsys.readouterr().out.splitlines()[0]
    with pytest.raises(SystemExit, match="another model"):
        command.main(["query", str(tmp_path / "index"), "What is the city?", *rest])
