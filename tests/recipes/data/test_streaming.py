"""Pairs read while training: real tar shards, broken rows among them, resuming, and what can't be streamed."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from recipes.data import streaming
from recipes.data.streaming import open_streams
from recipes.training.run import train
from tests.mmeb_train_files import jpeg, put
from tests.recipes.test_train import backbone, cache, config, log_of, weights  # noqa: F401

CHECK = {"on_error": "skip", "check_media": "decode", "buffer": 0}


def put_tar(path, samples):
    """A WebDataset shard: samples of `KEY.MEMBER` files."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for member, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{member}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of 10 and 6 samples; the picture of sample 7 is cut, the query of sample 12 is empty."""
    streaming._shown.clear()
    samples = {}
    for i in range(16):
        texts = json.dumps({"negative": f"not {i}"}).encode()
        query = f"find picture {i}".encode()
        samples[f"{i:03}"] = {"query.txt": query, "positive.jpg": jpeg(i), "json": texts}
    samples["007"]["positive.jpg"] = jpeg(7)[:-200]
    samples["012"]["query.txt"] = b" "
    keys = list(samples)
    put_tar(tmp_path / "shards" / "0.tar", {key: samples[key] for key in keys[:10]})
    put_tar(tmp_path / "shards" / "1.tar", {key: samples[key] for key in keys[10:]})
    return str(tmp_path / "shards" / "*.tar")


def test_rows_of_tar_shards_are_checked_as_they_come(shards, tmp_path, caplog):
    skipped = tmp_path / "skipped.jsonl"
    found = open_streams([shards], held_out=4, skipped=skipped, negatives=True, **CHECK)
    rows = list(found.rows)
    numbers = [row["query"]["text"].removeprefix("find picture ") for row in rows]
    assert numbers == ["4", "5", "6", "8", "9", "10", "11", "13", "14", "15"]
    assert all(isinstance(row["positive"]["image"], Image.Image) for row in rows)
    assert rows[0]["negative"] == {"text": "not 4"}
    assert [len(source.pairs) for source in found.held_out] == [4]
    assert found.held_out[0].read_all([(2, "positive")])[0]["image"].size == rows[0]["positive"]["image"].size
    reasons = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [entry["index"] for entry in reasons] == [7, 12]
    assert "truncated" in reasons[0]["reason"] and "query is empty" in reasons[1]["reason"]
    assert "row 7 skipped" in caplog.text
    assert list(found.files.values())[0][0].startswith("0.tar, ")


def test_a_broken_row_is_refused_where_asked_for(shards):
    found = open_streams([shards], held_out=4, **{**CHECK, "on_error": "raise"})
    with pytest.raises(ValueError, match="row 7 is broken: .*truncated"):
        list(found.rows)


def test_rows_like_a_held_out_one_do_not_train(tmp_path):
    pairs = [{"query": f"q {i % 6}", "positive": f"p {i}"} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found = open_streams([str(tmp_path / "a.jsonl")], held_out=3, **CHECK)
    assert [row["positive"]["text"] for row in found.rows] == ["p 3", "p 4", "p 5", "p 9", "p 10", "p 11"]


def test_a_caption_beside_its_picture_needs_no_names(tmp_path):
    put_tar(tmp_path / "plain.tar", {f"{i}": {"txt": f"caption {i}".encode(), "jpg": jpeg(i)} for i in range(3)})
    rows = list(open_streams([str(tmp_path / "plain.tar")], **CHECK).rows)
    assert [row["query"]["text"] for row in rows] == ["caption 0", "caption 1", "caption 2"]
    assert all("image" in row["positive"] for row in rows)


def test_sources_are_mixed_by_weight(tmp_path):
    for name in "ab":
        rows = [{"query": f"{name} {i}", "positive": f"p {i}"} for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    rows = [
        row["query"]["text"][0] for row, _ in zip(open_streams(paths, [3, 1], **CHECK).rows, range(100), strict=False)
    ]
    assert 60 < rows.count("a") < 90
    with pytest.raises(ValueError, match="one value per data set"):
        open_streams(paths, [1], **CHECK)


def test_errors_come_before_the_model_is_built(backbone, tmp_path, shards):  # noqa: F811
    for options, message in (
        ({"max_steps": -1}, "--stream needs --max_steps"),
        ({"data": []}, "--stream needs --data"),
        ({"hard_negatives": "mine", "miner": "x"}, "can't be used with --hard_negatives mine"),
        ({"distinct": True}, "--distinct"),
    ):
        with pytest.raises(ValueError, match=message):
            config(backbone, tmp_path, stream=True, **{"data": [shards], **options})
    for path, message in ((str(tmp_path / "none*.tar"), "no file matches"),):
        with pytest.raises(ValueError, match=message):
            train(config("nowhere", tmp_path, stream=True, data=[path]))
    put_tar(tmp_path / "other.tar", {"0": {"cls": b"3", "jpg": jpeg(0)}})
    with pytest.raises(ValueError, match="must have the columns query and positive"):
        train(config("nowhere", tmp_path, stream=True, data=[str(tmp_path / "other.tar")]))


def test_training_from_shards_and_resuming(backbone, tmp_path, shards):  # noqa: F811
    """Killed after two steps and resumed, it ends where one unbroken training ends, to the bit."""
    options = {"stream": True, "data": [shards], "validation_size": 2, "shuffle_buffer": 4, "max_steps": 4}
    whole = config(backbone, tmp_path / "whole", **options)
    path = train(whole)
    scores = (tmp_path / "whole" / "out" / "validation.jsonl").read_text().splitlines()
    assert len(scores) == 2, "before the first step and after the last"
    assert [json.loads(line)["index"] for line in (path.parent / "skipped_rows.jsonl").read_text().splitlines()]
    assert "## Data of this training" in (path / "README.md").read_text()

    class KilledError(Exception):
        pass

    def kill(*args, **kwargs):
        if args[0].state.global_step >= 2:
            raise KilledError
        return step(*args, **kwargs)

    from sentence_transformers import SentenceTransformerTrainer

    step = SentenceTransformerTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(SentenceTransformerTrainer, "training_step", kill)
        train(config(backbone, tmp_path / "cut", **options))
    again = train(config(backbone, tmp_path / "cut", **options, resume=True))
    expected, found = weights(path), weights(again)
    assert all((expected[name] == found[name]).all() for name in expected)
    put_tar(tmp_path / "shards" / "2.tar", {"100": {"query.txt": b"more", "positive.jpg": jpeg(3)}})
    with pytest.raises(ValueError, match=r"files of .*2\.tar"):
        train(config(backbone, tmp_path / "cut", **options, resume=True))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_one_source_holds_out_does_not_train_through_another(tmp_path):
    rows = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(20)]
    turned = [{"query": f"ask {i}", "positive": f"q {i} \r"} for i in range(15)]  # as a positive, with blanks behind
    paths = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])]
    paths.append(write(tmp_path / "c.jsonl", turned))
    found = open_streams(paths, held_out=3, **CHECK)
    held = {side["text"].strip() for head in found.held_out for row in head.pairs for side in row.values()}
    assert {"q 0", "q 19", "ask 2"} <= held
    seen = {side["text"].strip() for row, _ in zip(found.rows, range(100), strict=False) for side in row.values()}
    assert seen and not held & seen


def test_a_held_out_picture_does_not_train_beside_another_text(tmp_path):
    for i in range(6):
        put(tmp_path / f"{i}.jpg", jpeg(i))
        put(tmp_path / f"copy{i}.jpg", jpeg(i))
    rows = [{"query": f"question 0 {i}", "query_image": f"{i}.jpg", "positive": f"answer 0 {i}"} for i in range(6)]
    rows += [
        {"query": f"question 1 {i}", "query_image": f"copy{i}.jpg", "positive": f"answer 1 {i}"} for i in range(6)
    ]
    found = open_streams([write(tmp_path / "a.jsonl", rows)], held_out=2, **CHECK)
    assert [row["query"]["text"] for row in found.rows] == [f"question {k} {i}" for k in (0, 1) for i in (2, 3, 4, 5)]


def test_labels_stand_in_held_out_rows_and_train(tmp_path):
    rows = [{"query": f"what is {i}?", "positive": "yes" if i % 2 else "no"} for i in range(12)]
    found = open_streams([write(tmp_path / "a.jsonl", rows)], held_out=4, **CHECK)
    assert [row["query"]["text"] for row in found.rows] == [f"what is {i}?" for i in range(4, 12)]


def test_a_stream_that_is_held_out_whole_is_refused(backbone, tmp_path):  # noqa: F811
    path = write(tmp_path / "a.jsonl", [{"query": f"q {i}", "positive": f"p {i}"} for i in range(10)])
    for size in (10, 200):
        with pytest.raises(ValueError, match=f"more rows than are held out, but has 10 for --validation_size {size}"):
            open_streams([path], held_out=size, **CHECK)
    assert len(list(open_streams([path], held_out=9, **CHECK).rows)) == 1
    same = write(tmp_path / "same.jsonl", [{"query": "q", "positive": f"p {i}"} for i in range(10)])
    with pytest.raises(ValueError, match="no step was trained, as no row was left"):
        train(config(backbone, tmp_path, stream=True, data=[same], validation_size=3))
    assert not (tmp_path / "out" / "model").exists()


def test_prompts_of_a_stream_name_columns(backbone, tmp_path):  # noqa: F811
    path = write(tmp_path / "a.jsonl", [{"query": f"q {i}", "positive": f"p {i}"} for i in range(10)])
    name = open_streams([path], **CHECK).heads[0].name
    for prompts in ({name: "find: "}, {name: {"query": "find: "}}, {"query": {"query": "find: "}}):
        with pytest.raises(ValueError, match="--prompts must name columns with --stream, but .* are none"):
            train(config("nowhere", tmp_path, stream=True, data=[path], validation_size=2, prompts=prompts))


def test_a_pattern_reaches_into_folders_and_media_lie_beside_their_own_file(tmp_path):
    for place in ("", "x", "x/y"):
        folder = tmp_path / place
        put(folder / "img/1.jpg", jpeg(len(place)))
        write(folder / "rows.jsonl", [{"query": f"in {place}", "positive_image": "img/1.jpg"}])
    rows = {
        row["query"]["text"]: row["positive"]["image"]
        for row in open_streams([f"{tmp_path}/**/*.jsonl"], **CHECK).rows
    }
    assert set(rows) == {"in ", "in x", "in x/y"}
    for place in ("", "x", "x/y"):
        with Image.open(tmp_path / place / "img/1.jpg") as expected:
            assert rows[f"in {place}"].tobytes() == expected.convert("RGB").tobytes()


def test_parquet_files_of_several_folders_hold_their_media(tmp_path):
    for place in "ab":
        (tmp_path / place).mkdir()
        put(tmp_path / place / "1.jpg", jpeg(1))
        rows = {"query": [f"{place} 1"], "positive_image": ["1.jpg"]}
        pq.write_table(pa.table(rows), tmp_path / place / "rows.parquet")
    with pytest.raises(
        ValueError, match=r"files of 2 folders, .* but row 0 has positive_image '1.jpg'. Pass a --data"
    ):
        open_streams([f"{tmp_path}/*/rows.parquet"], **CHECK)
    (row,) = open_streams([f"{tmp_path}/a/*.parquet"], **CHECK).rows
    assert row["positive"]["image"].size == (56, 28)


def test_a_column_that_only_later_rows_have_is_read(tmp_path):
    put(tmp_path / "1.jpg", jpeg(1))
    rows = [{"anchor": f"q {i}", "positive": f"p {i}"} for i in range(70)]  # more than the rows that are looked at
    rows.append({"anchor": "q 70", "anchor_image": "1.jpg", "positive": "p 70"})
    *_, last = open_streams([write(tmp_path / "a.jsonl", rows)], **CHECK).rows
    assert set(last["query"]) == {"image", "text"}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_the_loader_lose_no_row(tmp_path, workers):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"query": f"q{name}{i}", "positive": f"p{name}{i}"} for i in range(20)])
    found = open_streams([f"{tmp_path}/*.jsonl"], held_out=10, **CHECK)
    rows = [row["query"]["text"] for row in DataLoader(found.rows, batch_size=None, num_workers=workers)]
    assert sorted(rows) == sorted([f"qa{i}" for i in range(10, 20)] + [f"qb{i}" for i in range(20)])


def test_broken_rows_among_the_held_out_are_told_once(tmp_path):
    rows = [{"query": "" if i in (1, 6) else f"q {i}", "positive": f"p {i}"} for i in range(9)]
    skipped = tmp_path / "skipped.jsonl"
    found = open_streams([write(tmp_path / "a.jsonl", rows)], held_out=4, skipped=skipped, **CHECK)
    assert len(list(found.rows)) == 4 and [entry.index for entry in found.heads[0].broken] == [1]
    assert [json.loads(line)["index"] for line in skipped.read_text().splitlines()] == [6]
