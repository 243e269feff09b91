"""A user's own pairs in every documented form."""

from __future__ import annotations

import datetime
import json
from collections import OrderedDict

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
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
    negatives = [images[2], images[0], images[0]]
    columns = {"query": ["a", "b", "c"], "positive": images, "negative_1": negatives, "negative_2": ["x", "y", "z"]}
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
    assert source.read_all([(0, "positive")])[0]["image"].tobytes() == row["negative_1"]["image"].tobytes()


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


LOADS = pytest.mark.parametrize(
    "load", [load_user_data, lambda paths, **check: open_streams(paths, **check).heads], ids=["checked", "streamed"]
)


@LOADS
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "b.csv", "a.tsv", "a.parquet"])
def test_every_table_gives_texts_as_they_are_written(tmp_path, name, load):
    """What `datasets` would make of them: None of NA, numbers of digits, time stamps of dates, one type a column."""
    pairs = [("NA", "null"), ("2024-01-05", "007"), ("None", "Äpfel")]
    if name == "a.parquet":
        pairs[:2] = [(b"NA", b"null"), (b"2024-01-05", b"007")]
        pairs = [tuple(text.encode() if isinstance(text, str) else text for text in pair) for pair in pairs]
        queries, positives = zip(*pairs, strict=True)
        pq.write_table(pa.table({"query": queries, "positive": positives}), tmp_path / name)
    elif name in ("a.jsonl", "a.json"):
        rows = [{"query": query, "positive": positive} for query, positive in pairs]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else lines)
    else:
        between = {"a.csv": ",", "b.csv": ";", "a.tsv": "\t"}[name]
        lines = ["query" + between + "positive", *(query + between + positive for query, positive in pairs)]
        (tmp_path / name).write_text("\ufeff" + "\r\n".join(lines))  # as Excel writes it
    (source,) = load([str(tmp_path / name)])
    found = [(row["query"]["text"], row["positive"]["text"]) for row in source.dataset()]
    assert found == [("NA", "null"), ("2024-01-05", "007"), ("None", "Äpfel")] and not source.broken


@LOADS
def test_columns_of_digits_and_dates_in_parquet_are_texts(tmp_path, load):
    days = [datetime.date(2024, 1, day) for day in (1, 2)]
    pq.write_table(pa.table({"query": [7, 8], "positive_text": days}), tmp_path / "a.parquet")
    (source,) = load([str(tmp_path / "a.parquet")])
    assert source.dataset()[1] == {"query": {"text": "8"}, "positive": {"text": "2024-01-02"}}


def test_pictures_in_a_column_of_plain_bytes(tmp_path):
    pq.write_table(pa.table({"query": ["a", "b"], "positive_image": [jpeg(1), jpeg(2)[:-60]]}), tmp_path / "a.parquet")
    (source,) = load_user_data([str(tmp_path / "a.parquet")])
    assert source.dataset()[0]["positive"]["image"].size == (56, 28) and [bad.index for bad in source.broken] == [1]


@LOADS
def test_a_broken_line_is_a_broken_row(tmp_path, load):
    lines = [b'{"query": "a", "positive": "b"}'] * 9
    lines[6] = b'{"query": "a", "positive": "b",}'
    lines[7] = b'{"query": "\xe4", "positive": "b"}'
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(lines))
    (source,) = load([str(tmp_path / "pairs.jsonl")])
    assert [entry.index for entry in source.broken] == [6, 7] and len(source.dataset()) == 7
    assert source.broken[0].reason == (
        "line 7 of pairs.jsonl is no JSON: a comma stands before the closing bracket. Remove it"
    )
    assert "line 8 of pairs.jsonl is not UTF-8" in source.broken[1].reason
    with pytest.raises(ValueError, match="row 6: line 7 of pairs.jsonl"):
        load([str(tmp_path / "pairs.jsonl")], on_error="raise")


def test_a_row_may_have_other_types_than_the_row_before(tmp_path):
    put(tmp_path / "0.jpg", jpeg(0))
    rows = [
        {"query": "a", "positive": "b"},
        {"query": {"text": 5, "image": "0.jpg"}, "positive": 7},
        {"question": "x", "query": "c", "positive": None},
        {"query": True, "positive": "d"},
    ]
    (source,) = load_user_data([write_jsonl(tmp_path / "mixed.jsonl", rows)])
    assert [entry.index for entry in source.broken] == [2, 3] and "got bool" in source.broken[1].reason
    assert list(source.dataset()[1]["query"]) == ["image", "text"] and source.dataset()[1]["query"]["text"] == "5"
    assert source.dataset()[1]["positive"] == {"text": "7"}


@LOADS
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("gone.jsonl", None, "there is no file|no file matches"),
        ("gone", None, "no file or folder 'gone'|no file or folder"),
        ("empty.csv", b"", "is empty. Write its rows"),
        ("head.csv", b"query,positive\n", "has no rows. Write some"),
        ("bad.jsonl", b"query;positive\na;b\n", "no row that can be read: line 1 of bad.jsonl is no JSON"),
        ("bad.parquet", b"query;positive\na;b\n", "no Parquet file|can't be loaded"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, monkeypatch, name, content, reason, load):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as raised:
        load([name])
    assert "\n" not in str(raised.value) and name.partition(".")[0] in str(raised.value)


def test_a_changed_table_is_read_again(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("query,positive\na,b\n")
    assert load_user_data([str(path)])[0].dataset()[0]["query"] == {"text": "a"}
    path.write_text("query,positive\nc,b\n")
    assert load_user_data([str(path)])[0].dataset()[0]["query"] == {"text": "c"}


def test_a_video_file_has_any_suffix(tmp_path):
    """As in encoding, whose reader looks into the file."""
    write_movie(tmp_path / "film.mp4")
    (tmp_path / "film.mp4").rename(tmp_path / "film.m4v")
    frames = [PILImage.new("RGB", (28, 28), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    put(tmp_path / "one.jpg", jpeg(0))
    rows = [{"query": "q", "positive_video": value} for value in ("film.m4v", "a.gif", ["one.jpg"])]
    (source,) = load_user_data([write_jsonl(tmp_path / "clips.jsonl", rows)])
    shown = [row["positive"]["video"]["array"] for row in source.dataset()]
    assert np.array_equal(shown[0], read_video(tmp_path / "film.m4v").frames) and not source.broken
    assert len(shown[1]) == 3 and len(shown[2]) == 2, "one frame is doubled"


def test_a_stored_image_without_bytes_lies_beside_its_table(tmp_path, monkeypatch):
    """Not in the working directory, where another picture has the name."""
    (tmp_path / "elsewhere").mkdir()
    PILImage.new("RGB", (56, 56), "red").save(tmp_path / "r.png")
    PILImage.new("RGB", (56, 56), "blue").save(tmp_path / "elsewhere" / "r.png")
    stored = pa.array(
        [{"bytes": None, "path": "r.png"}] * 2, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"query": ["a", "b"], "positive_image": stored}), tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in (*load_user_data([str(tmp_path / "a.parquet")]), *open_streams([str(tmp_path / "a.parquet")]).heads):
        assert source.dataset()[1]["positive"]["image"].getpixel((0, 0)) == (255, 0, 0)


@LOADS
def test_columns_that_are_not_used_are_named_once_with_what_they_may_mean(tmp_path, caplog, load):
    row = {"query": {"text": "a", "img": "r.png"}, "positive": "b", "hard_negative": "c", "query_img": "r.png"}
    load([write_jsonl(tmp_path / "a.jsonl", [{**row, "label": 0}, {**row, "url": "u", "positive": "c", "label": 1}])])
    (said,) = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    for part in (
        "columns hard_negative, query_img, label, query.img, url are not used",
        "negative for hard_negative, query_image for query_img, query_image for query.img",
        "label decides nothing: every row trains as a right pair",
    ):
        assert part in said
    caplog.clear()
    load([write_jsonl(tmp_path / "b.jsonl", [{"question": "a", "answer": "b", "negative_2": "c"}])])
    assert "not used" not in caplog.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"query": "17", "query_text": "how much?"},
            "query: its text is given twice, by the columns query and query_text",
        ),
        ({"query": {"text": "q", "image": "a.jpg"}, "query_image": "b.jpg"}, "query: its image is given twice"),
        ({"query": "q", "negative": " b "}, "negative is the row's own positive"),
        ({"query": "q", "query_image": ["a.jpg", "b.jpg"]}, "query: an image must be one path, got 2 in a list"),
    ],
)
def test_a_row_that_contradicts_itself_is_broken(tmp_path, row, reason):
    rows = [{"query": "a", "positive": "b", "negative": "c"}, {"positive": "b", **row}]
    (source,) = load_user_data([write_jsonl(tmp_path / "a.jsonl", rows)])
    assert [entry.index for entry in source.broken] == [1] and reason in source.broken[0].reason
    rows = [rows[0], {"positive": "b", "query": "", "query_text": "d"}]
    (source,) = load_user_data([write_jsonl(tmp_path / "b.jsonl", rows)])
    assert not source.broken and source.dataset()[1]["query"] == {"text": "d"}


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])], ids=str)
def test_a_stored_video_beside_a_text_is_not_passed_over(tmp_path, kind):
    value = b"film" if kind == pa.binary() else {"bytes": b"film", "path": None}
    columns = {"query": ["a", "b"], "positive": ["c", "d"], "positive_video": pa.array([value, None], kind)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (source,) = load_user_data([str(tmp_path / "a.parquet")])
    assert [entry.index for entry in source.broken] == [0]
    assert "positive: a video must be a path, got 4 bytes. Write them to a file" in source.broken[0].reason


@LOADS
def test_texts_that_name_files_are_noticed(tmp_path, caplog, load):
    for i in range(3):
        put(tmp_path / f"{i}.jpg", jpeg(i))
    rows = [{"query": f"page {i}", "positive": f"{i}.jpg"} for i in range(3)]
    load([write_jsonl(tmp_path / "a.jsonl", rows)])
    assert "every text of positive is the name of a file, such as '0.jpg'" in caplog.text
    assert "positive_image" in caplog.text
    caplog.clear()
    load([write_jsonl(tmp_path / "b.jsonl", [*rows, {"query": "x" * 5000, "positive": "a text"}])])
    assert "name of a file" not in caplog.text


@LOADS
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_an_emoji_is_a_broken_row(tmp_path, name, load):
    rows = [{"query": f"q{i}" + "\ud83d" * (i == 2) + "\ud83d\ude00", "positive": f"p{i}"} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else lines)
    (source,) = load([str(tmp_path / name)])
    assert [entry.index for entry in source.broken] == [2] and "holds half a character" in source.broken[0].reason
    assert source.dataset()[0]["query"] == {"text": "q0\U0001f600"}


def test_repaired_media_stay_skipped_until_they_are_checked_again_which_is_said(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": str(i), "positive_image": f"{i}.jpg"} for i in range(2)])
    put(tmp_path / "0.jpg", jpeg(0))
    load_user_data([path])
    put(tmp_path / "1.jpg", jpeg(1))
    caplog.clear()
    assert len(load_user_data([path])[0].pairs) == 1
    assert (
        "1 of 2 rows skipped; media that are repaired later stay skipped until recipes.train --recheck" in caplog.text
    )
    assert len(load_user_data([path], recheck=True)[0].pairs) == 2
