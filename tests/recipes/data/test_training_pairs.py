"""Checking rows: what counts as broken, caching, and errors for files that break later."""

from __future__ import annotations

from functools import partial

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from evaluation.media import BrokenMediaError
from recipes.data import training_pairs
from recipes.data.training_pairs import Side, check_source
from st_btok import build_model, checked_inputs, encode_checked
from tests.backbones import build, picture
from tests.mmeb_train_files import jpeg, put
from tests.st_btok.inputs.test_images import png_header


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def read(record, folder):
    negative = {"negative": Side(record["neg"])} if record["neg"] else {}
    return {"query": Side("what?", str(folder / record["image"])), "positive": Side(record["text"]), **negative}


@pytest.fixture
def table(tmp_path):
    for i in range(4):
        put(tmp_path / f"{i}.jpg", jpeg(i))
    put(tmp_path / "cut.jpg", jpeg(9)[:-60])
    put(tmp_path / "text.jpg", b"not an image")
    images = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "cut.jpg", "text.jpg", "none.jpg", "0.jpg"]
    texts = [*(f"text {i}" for i in range(7)), "  "]
    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"image": images, "text": texts, "neg": ["n", "", *["n"] * 6]}).to_parquet(str(path))
    return datasets.load_dataset("parquet", data_files=str(path), split="train")


def test_broken_rows_are_left_out_with_their_reason(table, tmp_path, caplog):
    source = check_source("mine", table, partial(read, folder=tmp_path))
    reasons = {entry.index: entry.reason for entry in source.broken}
    assert set(reasons) == {4, 5, 6, 7} and len(source.pairs) == 4
    assert "can't be decoded" in reasons[4] and "is not an image" in reasons[5]
    assert "none.jpg' can't be read: No such file" in reasons[6]
    assert reasons[7] == "positive is empty: neither text nor media"
    assert "mine: 4 of 8 rows skipped" in caplog.text
    assert source.pairs.column_names == ["query", "positive"], "row 1 has no negative, so none is used"
    assert "column negative is not used, 1 of 4 rows lack it" in caplog.text
    row = source.dataset()[3]
    assert row["query"]["image"].size == (56, 28) and list(row["query"]) == ["image", "text"]
    assert row["positive"] == {"text": "text 3"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript"),
        (png_header(50_000, 50_000), "(too large|more than)"),
        (png_header(0, 5), "(not an image|no pixels)"),
        (b"", "is not an image"),
    ],
)
def test_headers_are_read_as_encoding_reads_them(tmp_path, content, reason):
    """Also where nothing is decoded: the formats that are opened are the checked path's."""
    put(tmp_path / "a.png", content)
    table = Dataset.from_dict({"image": ["a.png"], "text": ["t"], "neg": [""]})
    with pytest.raises(ValueError, match=f"no usable row of 1 .row 0: query: .*{reason}"):
        check_source("mine", table, partial(read, folder=tmp_path), check_media="header")


def test_a_second_check_reads_no_file(table, tmp_path, monkeypatch):
    first = check_source("mine", table, partial(read, folder=tmp_path))

    def fail(*args):
        raise AssertionError("checked again")

    monkeypatch.setattr(training_pairs, "_check_image", fail)
    again = check_source("mine", table, partial(read, folder=tmp_path))
    assert again.broken == first.broken and again.pairs[:] == first.pairs[:]
    with pytest.raises(AssertionError, match="checked again"):
        check_source("mine", table, partial(read, folder=tmp_path), recheck=True)


def test_header_check_defers_a_damaged_end_to_training_where_it_is_an_error(table, tmp_path):
    source = check_source("mine", table, partial(read, folder=tmp_path), check_media="header")
    assert [entry.index for entry in source.broken] == [5, 6, 7]
    with pytest.raises(BrokenMediaError, match=r"mine, row 4, query: .*recheck=True"):
        source.dataset()[4]


def test_a_file_that_goes_missing_after_the_check_is_an_error(table, tmp_path):
    source = check_source("mine", table, partial(read, folder=tmp_path))
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(BrokenMediaError, match="mine, row 2, query"):
        source.read_all([(2, "query")])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_training_sees_the_pixels_that_encoding_sees(tmp_path, qwen, mode):
    """Invariant 14: one reader for training and encoding, and the pixels of plain `encode` where that is sound."""
    path = tmp_path / "picture.png"
    values = np.arange(56 * 28, dtype=np.uint16).reshape(28, 56) * 40
    image = picture(56, 28, 1).convert("RGBA")
    image.putalpha(100)
    (Image.fromarray(values) if mode == "I;16" else image.convert(mode)).save(path)
    side = {"text": "", "image": str(path), "video": [], "column": "", "digest": "", "row": 0}
    trained = np.asarray(training_pairs.as_input(side, Dataset.from_dict({}))["image"])
    checked = np.asarray(checked_inputs([path], qwen).inputs[0])
    assert np.array_equal(trained, checked)
    if mode != "I;16":  # which plain encode clips to white
        difference = qwen.encode([{"image": str(path)}]) - encode_checked(qwen, [path]).embeddings
        assert np.abs(difference).max() < 1e-5


def test_text_is_never_taken_for_a_file(table, tmp_path, qwen):
    side = {"text": "photo.jpg", "image": "", "video": [], "column": "", "digest": "", "row": 0}
    ids = qwen.preprocess([training_pairs.as_input(side, table)])["input_ids"]
    assert "photo.jpg" in qwen.tokenizer.decode(ids[0])


def test_nothing_usable_is_an_error(tmp_path):
    table = Dataset.from_dict({"image": ["a.jpg"], "text": ["t"], "neg": [""]})
    with pytest.raises(ValueError, match=r"mine has no usable row of 1 \(row 0: query: file"):
        check_source("mine", table, partial(read, folder=tmp_path))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_all_frames_of_a_video_reach_the_processor(tmp_path, family):
    """Qwen3-VL's processor samples videos without metadata: of 8 chosen frames it would drop 4."""
    backbone, processor = build(family)
    model = build_model(backbone, processor=processor, device="cpu")
    frames = [str(tmp_path / f"{i}.jpg") for i in range(8)]
    for i, frame in enumerate(frames):
        put(tmp_path / frame, jpeg(i))
    side = {"text": "a", "image": "", "video": frames, "column": "", "digest": "", "row": 0}
    features = model.preprocess([training_pairs.as_input(side, None)])
    assert features["video_grid_thw"][0, 0] == 8 // 2, "two frames make one temporal patch"
