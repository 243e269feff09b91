"""A user's own pairs in every documented form."""

from __future__ import annotations

import json
from collections import OrderedDict

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from torch import nn

from recipes.data.streaming import open_streams
from recipes.data.user_data import load_user_data
from st_btok import read_video
from tests.mmeb_train_files import jpeg, put
from tests.st_btok.inputs.test_videos import write_movie


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_with_images_and_videos_beside_it(tmp_path):
    put(tmp_path / "pages/0.jpg", jpeg(0))
    for frame in range(12):
        put(tmp_path / f"clips/a/{frame}.jpg", jpeg(frame))
    write_movie(tmp_path / "clips/film.mp4")
    put(tmp_path / "clips/cut.mp4", (tmp_path / "clips/film.mp4").read_bytes()[:900])
    rows = [
        {"query": "page?", "positive_image": "pages/0.jpg", "positive_text": "a page"},
        {"query": "clip?", "positive_video": "clips/a"},
        {"query": "film?", "positive_video": "clips/film.mp4"},
        {"query": "gone?", "positive_image": "pages/1.jpg"},
        {"query": "gone?", "positive_video": "clips/b"},
        {"query": "gone?", "positive_video": "clips/none.mp4"},
        {"query": "", "positive_image": "pages/0.jpg"},
        {"query": "cut", "positive_video": "clips/cut.mp4"},
    ]
    (source,) = load_user_data([write_jsonl(tmp_path / "my.pairs.jsonl", rows)])
    assert source.name == "my-pairs" and source.weight == 3 and source.target == "auto"
    assert [entry.index for entry in source.broken] == [3, 4, 5, 6, 7]
    assert "clips/none.mp4' does not exist or is empty" in source.broken[2].reason
    page, clip, film = (source.dataset()[i] for i in range(3))
    assert page["positive"]["text"] == "a page" and page["positive"]["image"].size == (56, 28)
    assert len(clip["positive"]["video"]["array"]) == 8
    shown = read_video(tmp_path / "clips/film.mp4").frames
    assert "that can be decoded" in source.broken[4].reason
    assert np.array_equal(film["positive"]["video"]["array"], shown) and film["query"] == {"text": "film?"}


def test_saved_datasets_with_image_columns_and_negatives(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(3)]
    images[1] = {"bytes": jpeg(1)[:-60], "path": None}
    columns = {"query": ["a", "b", "c"], "positive": images, "negative_1": images[::-1], "negative_2": ["x", "y", "z"]}
    features = Features(
        {"query": Value("string"), "positive": Image(), "negative_1": Image(), "negative_2": Value("string")}
    )
    data = Dataset.from_dict(columns, features=features)
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "saved"))
    (source,) = load_user_data([str(tmp_path / "saved")], [2.5])
    assert source.weight == 2.5 and source.pairs.column_names == ["query", "positive", "negative_1", "negative_2"]
    assert [entry.index for entry in source.broken] == [1] and "can't be decoded" in source.broken[0].reason
    row = source.dataset()[1]
    assert row["query"] == {"text": "c"} and row["negative_2"] == {"text": "z"}
    assert row["positive"]["image"].tobytes() != row["negative_1"]["image"].tobytes()
    assert source.read(0, "positive")["image"].tobytes() == row["negative_1"]["image"].tobytes()


def test_structs_and_an_image_column_beside_the_text(tmp_path):
    put(tmp_path / "0.jpg", jpeg(0))
    columns = {
        "query": [{"text": "colour?", "image": "0.jpg"}, {"text": "", "image": "0.jpg"}],
        "positive": ["red", "blue"],
        "positive_image": [{"bytes": jpeg(5), "path": None}, None],
    }
    side = {"text": Value("string"), "image": Value("string")}
    features = Features({"query": side, "positive": Value("string"), "positive_image": Image()})
    path = tmp_path / "pairs.parquet"
    Dataset.from_dict(columns, features=features).to_parquet(str(path))
    (source,) = load_user_data([str(path)])
    first, second = source.dataset()[0], source.dataset()[1]
    assert list(first["query"]) == ["image", "text"] and set(first["positive"]) == {"image", "text"}
    assert set(second["query"]) == {"image"} and second["positive"] == {"text": "blue"}


@pytest.mark.parametrize(
    "load", [load_user_data, lambda paths: open_streams(paths).heads], ids=["checked", "streamed"]
)
def test_columns_under_the_names_of_other_pairs(tmp_path, load):
    """As in sentence-transformers/all-nli (anchor, positive, negative) and gooaq (question, answer)."""
    rows = [{"anchor": "a", "positive": "b", "negative": "c"}, {"anchor": "d", "positive": "e", "negative": "f"}]
    (nli,) = load([write_jsonl(tmp_path / "nli.jsonl", rows)])
    assert nli.dataset()[1]["query"] == {"text": "d"} and nli.dataset()[1]["positive"] == {"text": "e"}
    (gooaq,) = load([write_jsonl(tmp_path / "gooaq.jsonl", [{"question": "a", "answer_text": "b"}])])
    assert gooaq.dataset()[0] == {"query": {"text": "a"}, "positive": {"text": "b"}}
    both = {"query": "a", "question": "x", "positive": "b", "questions": "y"}
    (kept,) = load([write_jsonl(tmp_path / "both.jsonl", [both])])
    assert kept.dataset()[0] == {"query": {"text": "a"}, "positive": {"text": "b"}}, "a name that is taken"


@pytest.mark.parametrize("stem", ["train", "eval", "append", "my.pairs"])
def test_the_trainer_can_keep_a_loss_under_the_name(tmp_path, stem):
    """It puts losses into a Sequential by the names of the data sets."""
    (source,) = load_user_data([write_jsonl(tmp_path / f"{stem}.jsonl", [{"query": "a", "positive": "b"}])])
    kept = nn.Sequential(OrderedDict({source.name: nn.Identity()}))
    assert list(dict(kept.named_children())) == [source.name] and source.name.startswith(stem.partition(".")[0])


def test_two_files_of_one_name_and_wrong_input(tmp_path):
    rows = [{"query": "a", "positive": "b"}]
    (tmp_path / "x").mkdir()
    paths = [write_jsonl(tmp_path / "p.jsonl", rows), write_jsonl(tmp_path / "x" / "p.jsonl", rows)]
    assert [source.name for source in load_user_data(paths)] == ["p", "p-1"]
    with pytest.raises(ValueError, match="one value per data set, got 1 for 2"):
        load_user_data(paths, [1.0])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"ask": "a", "positive": "b"}])
    with pytest.raises(ValueError, match=r"must have the columns query and positive .* \['ask', 'positive'\]"):
        load_user_data([bad])
    (tmp_path / "pairs.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="must be one of"):
        load_user_data([str(tmp_path / "pairs.xml")])
