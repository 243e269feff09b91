"""Pairs read while training: real tar shards, broken rows among them, resuming, and what can't be streamed."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from recipes.data import streaming
from recipes.data.streaming import open_streams
from recipes.training.run import train
from tests.mmeb_train_files import jpeg
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
