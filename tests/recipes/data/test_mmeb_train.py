"""The MMEB-V2 training mix: the rows' values, every reader on files in the hub's form, broken rows, lazy decoding."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest

from evaluation.mmeb_v2.sources import DataRoot
from recipes.data.mmeb_train import instructions, load_mmeb_train, read_colpali, read_mmeb
from recipes.data.mmeb_train_sources import MMEB_TRAIN, VISRAG_PAGE, VISRAG_QUERY
from st_btok import BTokLoss
from st_btok.training.content import read_content
from tests.backbones import picture
from tests.mmeb_train_files import RAW, write, write_all

BY_NAME = {source.name: source for source in MMEB_TRAIN}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("mix")
    return path, write_all(path)


def test_the_mix_is_that_of_the_release():
    assert len(MMEB_TRAIN) == 25 and len(BY_NAME) == 25
    assert sum(source.weight for source in MMEB_TRAIN) == 52
    assert Counter(source.target for source in MMEB_TRAIN) == {"positive": 16, "query": 6, "none": 2, "both": 1}
    assert sum(source.num_rows for source in MMEB_TRAIN if source.family == "mmeb") == 1_068_469
    assert BY_NAME["visrag-indomain"].weight == 12 and BY_NAME["WebQA"].target == "both"
    assert all("." not in source.name for source in MMEB_TRAIN), "losses are modules by these names"


def test_every_source_reads_and_reports_its_broken_rows(root, caplog):
    path, written = root
    sources = load_mmeb_train(str(path), offline=True)
    assert [source.name for source in sources] == [source.name for source in MMEB_TRAIN]
    for source in sources:
        expected = written[source.name]
        assert source.num_rows == expected.rows, source.name
        assert tuple(entry.index for entry in source.broken) == expected.broken, (source.name, source.broken)
        assert len(source.pairs) == expected.rows - len(expected.broken) == 4
        assert all(entry.dataset == source.name and entry.reason for entry in source.broken)
        row = source.dataset()[0]
        assert set(row) >= {"query", "positive"}
    assert "VisDial, row 4 skipped: positive: file" in caplog.text and "can't be decoded" in caplog.text


@pytest.mark.parametrize("name", RAW)
def test_texts_of_mmeb_train_are_the_authors(name, tmp_path):
    query, query_image, positive, positive_image, negative = RAW[name]
    record = {
        "qry": query.format(i=1),
        "qry_image_path": "images/q.jpg" if query_image else "",
        "pos_text": positive.format(i=1),
        "pos_image_path": "images/p.jpg" if positive_image else "",
    }
    sides = read_mmeb(record, BY_NAME[name], DataRoot(tmp_path))
    text = sides["query"].text
    assert text.endswith("\n") and not text.endswith("\n\n"), "queries end in one newline"
    assert "<|image_1|>" not in text + sides["positive"].text
    expected = query.format(i=1).removeprefix("<|image_1|>\n")
    if name == "VisDial":
        expected = expected.replace("retrieval: Q:", "retrieval:\nQ:")
    assert text == expected
    bare = positive.format(i=1).removeprefix("<|image_1|>\n")
    assert sides["positive"].text == (bare.rstrip("\n") + "\n" if positive_image else bare.rstrip(" \t"))
    assert bool(sides["query"].image) == query_image and bool(sides["positive"].image) == positive_image
    own = instructions(BY_NAME[name])
    assert any(text.startswith(instruction) for instruction in own)


@pytest.mark.parametrize("root", ["MMEB-train", "MMEB-train/image", "vlm2vec_train/MMEB-train/image"])
def test_images_are_found_where_either_training_has_them(root, tmp_path):
    file = tmp_path / root / "images/ChartQA/Train/a.png"
    file.parent.mkdir(parents=True)
    picture(56, 28).save(file)
    record = {"qry": "<|image_1|>\nwhat?\n", "qry_image_path": "images/ChartQA/Train/a.png", "pos_text": "Yes"}
    assert read_mmeb(record, BY_NAME["ChartQA"], DataRoot(tmp_path))["query"].image == str(file)


def test_instructions_are_not_generated(qwen, tmp_path):
    BTokLoss(qwen, instructions=[text for source in MMEB_TRAIN for text in instructions(source)])
    for name, (query, query_image, positive, positive_image, _) in RAW.items():
        record = {"qry": query.format(i=1), "qry_image_path": "q.jpg" if query_image else ""}
        record |= {"pos_text": positive.format(i=1), "pos_image_path": "p.jpg" if positive_image else ""}
        source = BY_NAME[name]
        for side, value in read_mmeb(record, source, DataRoot(tmp_path)).items():
            inputs = {"image": picture(56, 28)} if value.image else {}
            content = read_content(qwen.preprocess([{**inputs, "text": value.text}]))[0].text
            instruction = source.query_instruction if side == "query" else source.positive_instruction
            assert qwen.tokenizer.decode(content).strip() == value.text.removeprefix(instruction).strip(), (name, side)


def test_negatives_are_read_where_rows_have_them(root, tmp_path):
    path, _ = root
    sources = {s.name: s for s in load_mmeb_train(str(path), ["OK-VQA", "SUN397", "CIRR", "VisDial"], offline=True)}
    assert sources["OK-VQA"].dataset()[1]["negative"] == {"text": "husky 1"}
    assert "negative" not in sources["SUN397"].pairs.column_names
    assert "negative" not in sources["CIRR"].pairs.column_names
    negative = sources["VisDial"].dataset()[0]["negative"]
    assert negative["text"] == "Represent the given image\n" and negative["image"].size == (56, 28)


def test_pages_and_their_wording(root):
    path, _ = root
    colpali, visrag = load_mmeb_train(str(path), ["colpali_train_set", "visrag-indomain"], offline=True)
    first, second = colpali.dataset()[0], colpali.dataset()[1]
    assert first["query"]["text"] == "what is on page 0? Options: ['A) red', 'B) blue']"
    assert first["positive"] == {"text": "blue"} and second["positive"] == {"text": "answer 1"}
    assert first["query"]["image"].mode == "RGB"
    row, unknown = visrag.dataset()[0], visrag.dataset()[1]
    assert row["query"]["text"] == VISRAG_QUERY["PlotQA"] + "what is on page 0?"
    assert row["positive"]["text"] == VISRAG_PAGE["PlotQA"]
    assert unknown["query"]["text"] == "what is on page 1?" and set(unknown["positive"]) == {"image"}


def test_an_option_is_only_resolved_for_a_bare_letter():
    def read(answer, options):
        record = {"query": "q", "answer": answer, "options": options}
        return read_colpali(record, BY_NAME["colpali_train_set"], None)["positive"].text

    assert read("B", "['red', 'B. blue']") == "blue"
    assert read("E", "['red', 'blue']") == "E"
    assert read("blue", "['red', 'blue']") == "blue"
    assert read("A", "not a list") == "A"


def test_videos_show_eight_frames_and_captions_serve_both_directions(root):
    path, _ = root
    names = ["video_caption_300k", "video_caption_300k-video", "video_qa_240k"]
    caption, video, qa = load_mmeb_train(str(path), names, offline=True)
    row = caption.dataset()[0]
    assert row["query"]["text"] == "Describe it." and row["positive"] == {"text": "A kite flies 0."}
    frames = row["query"]["video"]
    assert len(frames["array"]) == 8 and frames["video_metadata"]["total_num_frames"] == 8
    shown = caption.pairs[0]["query"]["video"]
    assert [p[-9:-5] for p in shown] == ["0001", "0002", "0003", "0004", "0006", "0007", "0008", "0010"]
    row = video.dataset()[0]
    assert row["query"] == {"text": "Find a video that contains the following visual content: A kite flies 0."}
    assert row["positive"]["text"] == "Understand the content of the provided video:"
    text = qa.dataset()[0]["query"]["text"]
    assert text == "Answer a question based on the content of a video.\nWhat happens in clip 0?"


def test_raise_names_source_row_and_reason(tmp_path):
    write(BY_NAME["OK-VQA"], tmp_path)
    with pytest.raises(ValueError, match=r"OK-VQA: 3 of 7 rows are broken:\n  row 4: query: file .*q_4.jpg"):
        load_mmeb_train(str(tmp_path), ["OK-VQA"], offline=True, on_error="raise")


def test_missing_tables_and_unknown_names_are_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown sources"):
        load_mmeb_train(str(tmp_path), ["COCO"])
    for name in ("OK-VQA", "video_qa_240k"):
        with pytest.raises(FileNotFoundError, match=f"{name} needs"):
            load_mmeb_train(str(tmp_path), [name], offline=True)
