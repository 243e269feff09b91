"""All 78 data sets, in both layouts, with broken rows among the good ones."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from PIL import Image

from evaluation.dataset import InputSettings
from evaluation.media import BrokenMediaError, StoredFrames, check_image, choose_frames, natural_key, stored_frames
from evaluation.mmeb_v2 import MMEB_V2, sources
from evaluation.mmeb_v2.image import load_image
from evaluation.mmeb_v2.sources import DataRoot, local_version, read_table
from evaluation.mmeb_v2.video import load_video
from evaluation.mmeb_v2.visdoc import load_visdoc, with_page_split
from evaluation.pool import document_id, sampled_rows

LOADERS = {"image": load_image, "video": load_video, "visdoc": load_visdoc}
ROWS = {f"{row.group}/{row.name}": row for row in MMEB_V2}


def row_of(name):
    return next(row for row in MMEB_V2 if row.name == name)


def load(written, **kwargs):
    return LOADERS[written.row.modality](written.row, DataRoot(written.root, offline=True), **kwargs)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("name", ROWS)
def test_good_rows_are_loaded_and_broken_ones_reported(name, layout, write, caplog):
    written = write(ROWS[name], layout)
    with caplog.at_level(logging.WARNING):
        loaded = load(written)
    assert len(loaded.data["queries"]) == written.queries > 0
    skipped = [entry.index for entry in loaded.broken if "skipped" in entry.reason]
    assert sorted(skipped) == list(written.broken_queries)
    assert loaded.skipped_queries == len(written.broken_queries)
    assert all(entry.dataset == written.row.name for entry in loaded.broken)
    assert all(f"{entry.dataset}, row {entry.index}" in caplog.text for entry in loaded.broken)
    corpus = set(loaded.data["corpus"]["id"])
    assert len(corpus) == len(loaded.data["corpus"])
    assert set(loaded.data["relevant_docs"]) == set(loaded.data["queries"]["id"])
    assert all(set(grades) <= corpus for grades in loaded.data["relevant_docs"].values())
    assert (loaded.data["top_ranked"] is None) == (written.row.candidates == "global")
    for query, listed in (loaded.data["top_ranked"] or {}).items():
        assert set(loaded.data["relevant_docs"][query]) <= set(listed) <= corpus
        assert len(set(listed)) == len(listed), "duplicated candidates must collapse"


def test_duplicate_candidates_collapse_and_the_broken_negative_is_left_out(write):
    loaded = load(write(row_of("CIRR")))
    sizes = {query: len(listed) for query, listed in loaded.data["top_ranked"].items()}
    assert sizes == dict.fromkeys(("q0", "q1", "q2", "q3", "q6"), 3), "four entries each, two of them the same"
    assert sum("none.png" in entry.reason for entry in loaded.broken) == 1


def test_image_texts_are_the_official_ones_in_both_repositories(write, tmp_path):
    row = row_of("N24News")
    text = "Represent the given news image with the following caption for domain classification: body 0\n"
    written = write(row)
    assert load(written).data["queries"][0]["text"] == text
    folder = written.root / "MMEB_Test_Instruct" / row.config
    table = Dataset.from_parquet(str(next(folder.glob("*.parquet")))).remove_columns(["qry_inst", "tgt_inst"])
    table = table.map(lambda r: {"qry_text": "<|image_1|>\n" + text.replace("body 0", r["qry_text"])})
    other = written.root / "TIGER-Lab/MMEB-eval" / row.config
    other.mkdir(parents=True)
    table.to_parquet(str(other / "test-00000-of-00001.parquet"))
    for file in folder.glob("*"):
        file.unlink()
    assert load(written).data["queries"][0]["text"] == text


def test_an_empty_body_leaves_no_blank_before_the_newline(write):
    written = write(replace(row_of("N24News"), query_text="Instruction: {qry_text}\n"))
    folder = written.root / "MMEB_Test_Instruct/N24News"
    file = next(folder.glob("*.parquet"))
    Dataset.from_parquet(str(file)).map(lambda r: {"qry_text": ""}).to_parquet(str(file))
    assert load(written).data["queries"][0]["text"] == "Instruction:\n"


@pytest.mark.parametrize(
    ("name", "query", "candidates"),
    [
        ("MVBench", "?\nOptions:\n(A) red\n(B) blue\n(C) green", {"(A) red", "(B) blue", "(C) green"}),
        ("Video-MME", "Question:  what is 0?\nA. red.\nB. blue.\nC. green.\nD. blue.", {"red", "blue", "green"}),
        ("NExTQA", "Options:\n(A) red\n(B) blue\n(C) green\n(D) blue\n(E) grey", {"red", "blue", "green", "grey"}),
        ("EgoSchema", "what is 0?A. red. B. blue. C. green. D. blue. E. grey.", {"red", "blue", "green", "grey"}),
        ("ActivityNetQA", "Question:  what is 0?? (A) yes; (B) no.", {"yes", "no"}),
    ],
)  # fmt: skip
def test_video_questions_show_their_options_as_upstream(name, query, candidates, write):
    data = load(write(row_of(name))).data
    assert data["queries"][0]["text"].endswith(query)
    assert set(data["corpus"]["text"]) == candidates
    assert list(data["relevant_docs"]["q0"]) == [
        document_id({"MVBench": "(A) red", "Video-MME": "A. red.", "EgoSchema": "A. red."}.get(name, ""))
        if name not in ("NExTQA", "ActivityNetQA")
        else document_id("red" if name == "NExTQA" else "yes")
    ]


def test_moment_queries_have_no_medium_an_image_or_a_clip(write):
    queries = load(write(row_of("MomentSeeker"))).data["queries"]
    kinds = [(row["image"] is not None, row["video"] is not None) for row in queries]
    assert kinds == [(False, False), (True, False), (False, True), (False, False)]
    assert [text.split(":")[0] for text in queries["text"]] == [
        "Find the clip that corresponds to the given text",
        "Select the video clip that aligns with the given text and image",
        "Find the clip that corresponds to the given sentence and video segment",
        "Find the clip that corresponds to the given text",
    ]
    assert len(queries[2]["video"].paths) == 4, "all stored frames, no sub-sampling"


def test_relevance_is_graded_and_the_larger_of_two_judgements_wins(write):
    data = load(write(row_of("ViDoRe_esg_reports_human_labeled_v2"))).data
    assert data["relevant_docs"] == {"q0": {"p0": 1, "p1": 3}, "q1": {"p2": 3}, "q2": {"p3": 1}}


UNPACKED = {
    "GQA": "image-tasks/q/0.jpg",
    "CIRR": "image-tasks/c/0.png",
    "HMDB51": "video-tasks/frames/video_cls/HMDB51/0/frame_0001.jpg",
    "SmthSmthV2": "video-tasks/frames/video_cls/SSv2/0/frame_0001.jpg",
    "MVBench": "video-tasks/frames/video_qa/MVBench/action_count/0.mp4/frame_0001.jpg",
    "Video-MME": "video-tasks/frames/video_qa/Video-MME/0/frame_0001.jpg",
    "NExTQA": "video-tasks/frames/video_qa/NExTQA/0/frame_0001.jpg",
    "EgoSchema": "video-tasks/frames/video_qa/EgoSchema/0/frame_0001.jpg",
    "ActivityNetQA": "video-tasks/frames/video_qa/ActivityNetQA/v_0/frame_0001.jpg",
    "QVHighlight": "video-tasks/frames/video_mret/QVHighlight/v0/query/frame_0001.jpg",
    "Charades-STA": "video-tasks/frames/video_mret/Charades_STA/v0/query/frame_0001.jpg",
    "MomentSeeker": "video-tasks/frames/video_mret/MomentSeeker/video_frames/movie_0_clip0/frame_0001.jpg",
    **{
        name: f"video-tasks/frames/video_ret/data/ziyan/video_retrieval/{name}/frames/v0/frame_0001.jpg"
        for name in ("DiDeMo", "MSR-VTT", "MSVD", "VATEX", "YouCook2")
    },
}
"""Where the official download script leaves the archives' files, written down by hand."""


@pytest.mark.parametrize("name", UNPACKED)
def test_the_archives_are_found_as_the_official_script_unpacks_them(name, write):
    written = write(row_of(name), 1 if row_of(name).group == "V-RET" else 0)
    assert (written.root / UNPACKED[name]).is_file()
    assert len(load(written).data["queries"]) == written.queries


@pytest.mark.parametrize("name", ["MVBench", "Video-MME", "NExTQA", "EgoSchema", "ActivityNetQA"])
def test_questions_about_videos_are_found_in_the_archives_own_folder(name, write):
    written = write(row_of(name))
    place = written.root / "video-tasks/frames/video_qa"
    place.rename(place.with_name("inner"))
    place.mkdir()
    place.with_name("inner").rename(place / "video_qa")
    assert len(load(written).data["queries"]) == written.queries


def test_more_frames_are_shown_of_the_same_data(write):
    written = write(row_of("MSVD"))
    whole = replace(written, row=replace(written.row, inputs=InputSettings(num_frames=64)))
    eight, all_ten = load(written), load(whole)
    assert {len(video.paths) for video in eight.data["corpus"]["video"]} == {8}
    assert {len(video.paths) for video in all_ten.data["corpus"]["video"]} == {10}
    assert eight.digest == all_ten.digest, "the data are the same, so models may be compared on them"
    assert InputSettings(num_frames=64).label == ".frames64" and not InputSettings().label
    with pytest.raises(ValueError, match="frames must be at least 1"):
        InputSettings(num_frames=0)
    with pytest.raises(ValueError, match="leaves every instruction out"):
        InputSettings(instruction="none", candidate_instruction="a")


@pytest.mark.parametrize("name", ROWS)
def test_bodies_and_instructions_are_told_apart(name, write):
    """Every query has an instruction, no body holds it, and candidates have one where they have media."""
    written = write(ROWS[name])
    system = replace(written, row=replace(written.row, inputs=InputSettings(instruction="system")))
    plain, apart = load(written).data, load(system).data
    for before, after in zip(plain["queries"], apart["queries"], strict=True):
        told = after["task_prompt"]
        assert told and told not in after["text"]
        assert told.rstrip(":") in before["text"] and after["text"].strip() in before["text"]
    media = {"image", "video"} & set(apart["corpus"].column_names)
    assert bool(media) == ("task_prompt" in apart["corpus"].column_names)


def test_ready_texts_can_not_be_taken_apart(write):
    written = write(row_of("N24News"))
    folder = written.root / "MMEB_Test_Instruct" / "N24News"
    file = next(folder.glob("*.parquet"))
    Dataset.from_parquet(str(file)).remove_columns(["qry_inst", "tgt_inst"]).to_parquet(str(file))
    system = replace(written, row=replace(written.row, inputs=InputSettings(instruction="system")))
    assert load(written).data["queries"]
    with pytest.raises(ValueError, match="can't be told from the rest: use ziyjiang/MMEB_Test_Instruct"):
        load(system)


def test_page_splits_read_different_repositories(write):
    fixed = row_of("ViDoSeek-page")
    broken = with_page_split(fixed, "page")
    assert (fixed.hub_id, broken.hub_id) == ("VLM2Vec/ViDoSeek-page-fixed", "VLM2Vec/ViDoSeek-page")
    assert with_page_split(row_of("MMLongBench-page"), "page").hub_id == "VLM2Vec/MMLongBench", "as its history has it"
    assert with_page_split(row_of("ViDoSeek-doc"), "page") == row_of("ViDoSeek-doc")
    with pytest.raises(ValueError, match="page_split must be one of"):
        with_page_split(fixed, "old")
    written = write(broken)
    assert load(written).data["queries"]
    with pytest.raises(FileNotFoundError, match="ViDoSeek-page-fixed"):
        load(replace(written, row=fixed))


def test_tables_that_are_not_local_come_from_the_hub_at_the_pinned_revision(tmp_path, monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return []

    monkeypatch.setattr(sources, "load_dataset", load)
    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda self, hub_id: SimpleNamespace(sha=f"head of {hub_id}"))
    pinned = replace(row_of("NExTQA"), revision="abc")
    root = DataRoot(tmp_path)
    assert read_table(pinned, root) == []
    read_table(row_of("VisRAG_PlotQA"), root, "corpus")
    plot = "openbmb/VisRAG-Ret-Test-PlotQA"
    assert asked == [
        (("VLM2Vec/NExTQA", "MC"), {"split": "test", "revision": "abc"}),
        ((plot, "corpus"), {"split": "train", "revision": f"head of {plot}"}),
    ]
    assert root.read == {"VLM2Vec/NExTQA": "abc", plot: f"head of {plot}"}
    with pytest.raises(FileNotFoundError, match="NExTQA needs the table.*config MC, split test.*snapshot"):
        read_table(pinned, DataRoot(tmp_path, offline=True))


def test_without_the_hub_the_copy_that_datasets_keeps_has_an_unknown_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **kwargs: [kwargs["revision"]])
    root = DataRoot(tmp_path)  # the tests have no network
    assert read_table(row_of("NExTQA"), root) == [None]
    assert root.read == {"VLM2Vec/NExTQA": sources.UNKNOWN}


def test_local_files_are_known_by_commit_or_content(write, tmp_path):
    written = write(row_of("ViDoRe_docvqa"))
    place = written.root / written.row.hub_id
    plain = local_version(place)
    assert plain.startswith("files ") and plain == local_version(place)
    commit = "c" * 40
    for file in [path for path in place.rglob("*") if path.is_file()]:
        note = place / ".cache/huggingface/download" / f"{file.relative_to(place)}.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{commit}\netag\n0\n")
    assert local_version(place) == commit
    snapshot = tmp_path / "hub/datasets--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    assert local_version(snapshot) == "0123"
    assert load(replace(written, row=replace(written.row, revision=commit))).data["queries"]
    with pytest.raises(ValueError, match="pinned to revision abc.*are of cccc"):
        load(replace(written, row=replace(written.row, revision="abc")))
    note.unlink()
    assert local_version(place) == plain, "one file is of unknown origin"
    (place / "queries/test-00000-of-00001.parquet").write_bytes(b"other")
    assert local_version(place) not in (plain, commit)


def test_a_hub_snapshot_is_read_by_the_configurations_in_its_card(write):
    """The card decides where the files of a configuration are, whatever their names."""
    written = write(row_of("ViDoRe_docvqa"))
    place = written.root / written.row.hub_id
    card = ["---", "configs:"]
    for config in ("corpus", "queries", "qrels"):
        (place / config).rename(place / f"x-{config}")
        card += [f"- config_name: {config}", "  data_files:", "  - split: test", f"    path: x-{config}/*.parquet"]
    (place / "README.md").write_text("\n".join([*card, "---", ""]))
    assert len(load(written).data["queries"]) == written.queries


def test_a_label_set_of_the_wrong_size_is_refused_until_the_official_list_is_there(write):
    written = write(row_of("HMDB51"))
    larger = replace(written, row=replace(written.row, num_candidates=4))
    with pytest.raises(ValueError, match="ranks against 4 labels.*labels/HMDB51.txt"):
        load(larger)
    (written.root / "labels").mkdir()
    (written.root / "labels/HMDB51.txt").write_text("label_0\nlabel_1\nlabel_2\nnever_seen\n")
    assert len(load(larger).data["corpus"]) == 4


def test_k700_ranks_against_its_700_official_labels(write):
    """Its annotations show only some of them."""
    written = write(row_of("K700"))
    (written.root / "labels/K700.txt").unlink()
    file = written.root / written.row.annotation
    file.write_text(file.read_text().replace("label_0", "lifting_hat").replace("label_1", "playing_poker"))
    loaded = load(replace(written, row=replace(written.row, num_candidates=700)))
    corpus = loaded.data["corpus"]["text"]
    assert len(corpus) == len(set(corpus)) == 700 and "massaging_person's_head" in corpus
    assert len(loaded.data["queries"]) == 4, "label_2 is no class of K700"


def test_nothing_usable_is_an_error_that_names_the_folders(write):
    written = write(row_of("HMDB51"))
    with pytest.raises(ValueError, match="no usable query.*video-tasks"):
        load(replace(written, row=replace(written.row, media_roots=("video-tasks/elsewhere",))))


def test_a_fraction_is_a_fixed_part_of_the_queries_and_keeps_a_global_corpus(write):
    written = write(row_of("MSVD"))
    whole, part = load(written), load(written, fraction=0.5, seed=3)
    assert 0 < len(part.data["queries"]) + part.skipped_queries == 4
    assert part.data["corpus"]["id"] == whole.data["corpus"]["id"]
    assert set(part.data["queries"]["id"]) < set(whole.data["queries"]["id"])
    assert load(written, fraction=0.5, seed=3).data["queries"]["id"] == part.data["queries"]["id"]


def test_sampled_rows():
    assert sampled_rows(5, 1, 0) == [0, 1, 2, 3, 4]
    assert sampled_rows(1000, 0.1, 0) == sampled_rows(1000, 0.1, 0) != sampled_rows(1000, 0.1, 1)
    assert len(sampled_rows(1000, 0.1, 0)) == 100 and sampled_rows(3, 0.001, 0)
    for fraction in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            sampled_rows(5, fraction, 0)


def test_eight_frames_are_spread_as_upstream():
    frames = [Path(f"{i}") for i in range(64)]
    assert choose_frames(frames) == ("0", "9", "18", "27", "36", "45", "54", "63")
    assert choose_frames(frames[:9]) == ("0", "1", "2", "3", "4", "5", "6", "8")
    assert choose_frames(frames[:5]) == tuple("01234")


def test_frames_are_in_natural_order_under_both_naming_schemes(tmp_path, write):
    for folder, names in {"a": ["frame_9.jpg", "frame_10.jpg"], "b": ["0009.jpeg", "0010.jpeg"]}.items():
        (tmp_path / folder).mkdir()
        for name in [*names, "notes.txt"]:
            (tmp_path / folder / name).write_bytes(b"")
        assert [path.name for path in stored_frames(tmp_path / folder)] == names
    with pytest.raises(BrokenMediaError, match="does not exist"):
        stored_frames(tmp_path / "none")
    assert natural_key("a2") < natural_key("a10") < natural_key("b1")


def test_videos_decode_only_what_is_asked_for(write):
    video = load(write(row_of("MSVD"))).data["corpus"][0]["video"]
    assert isinstance(video, StoredFrames) and video.metadata.num_frames == 8
    data = video.get_frames_at([0, 7]).data
    assert data.shape == (2, 3, 30, 28)
    assert np.array_equal(data[1].permute(1, 2, 0).numpy(), np.asarray(video.images()[7]))


def test_cut_off_images_are_found(tmp_path):
    from_bytes = write_noise(tmp_path / "good.jpg")
    check_image(from_bytes)
    check_image(str(tmp_path / "good.jpg"))
    for broken in (from_bytes[:200], b"", b"not an image"):
        with pytest.raises(BrokenMediaError):
            check_image(broken)
    with pytest.raises(BrokenMediaError, match="does not exist"):
        check_image(str(tmp_path / "none.jpg"))


def write_noise(path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_a_missing_shard_is_refused_whatever_names_the_files(write):
    """Half a corpus would score higher than all of it."""
    written = write(row_of("ViDoRe_docvqa"))
    place = written.root / written.row.hub_id
    corpus = place / "corpus"
    whole = corpus / "test-00000-of-00001.parquet"
    whole.rename(corpus / "test-00000-of-00002.parquet")
    with pytest.raises(
        ValueError, match="corpus must hold all 2 parts of a table, it has test-00000-of-00002.parquet"
    ):
        load(written)
    files = "\n".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/*.parquet"
        for name in ("corpus", "queries", "qrels")
    )
    (place / "README.md").write_text(f"---\nconfigs:\n{files}\n---\n")
    with pytest.raises(ValueError, match="must hold all 2 parts"):
        load(written)


@pytest.mark.parametrize("name", ["ViDoRe_docvqa", "MSVD"])
def test_another_splits_file_is_no_stand_in(name, write):
    written = write(row_of(name))
    assert written.row.split == "test"
    for file in list(written.root.rglob("test-*.parquet")):
        file.rename(file.with_name(file.name.replace("test-", "train-")))
    with pytest.raises(FileNotFoundError, match="needs the table"):
        load(written)


def test_tables_of_two_copies_are_not_mixed(write):
    first, second = write(row_of("ViDoRe_docvqa")), write(row_of("ViDoRe_docvqa"), 1)
    shutil.copytree(second.root / second.row.annotation, first.root / first.row.annotation)
    shutil.rmtree(first.root / first.row.hub_id / "corpus")
    with pytest.raises(ValueError, match="all tables of vidore/docvqa_test_subsampled_beir from one copy"):
        load(first)


def test_clips_and_pages_that_are_not_there_are_reported(write):
    clips = write(row_of("QVHighlight"))
    folder = clips.root / clips.row.media_roots[0]
    shutil.rmtree(folder / "v0/negative_1")
    reasons = [entry.reason for entry in load(clips).broken]
    assert "2 of 3 clips are there" in reasons
    pages = write(row_of("ViDoRe_docvqa"))
    assert not any("pages" in entry.reason for entry in load(pages).broken)
    larger = replace(pages, row=replace(pages.row, num_candidates=9))
    assert "the corpus has 7 of 9 pages" in [entry.reason for entry in load(larger).broken]
    qrels = pages.root / pages.row.hub_id / "qrels/test-00000-of-00001.parquet"
    table = Dataset.from_parquet(str(qrels))
    concatenate_datasets(
        [table, table.select([0]).map(lambda row: {"corpus-id": 77}, load_from_cache_file=False)]
    ).to_parquet(str(qrels))
    reasons = [entry.reason for entry in load(pages).broken]
    assert "page p77, right for query q0, is not in the corpus" in reasons


def test_a_query_id_counts_once(write):
    written = write(row_of("ViDoRe_docvqa"))
    file = written.root / written.row.hub_id / "queries/test-00000-of-00001.parquet"
    table = Dataset.from_parquet(str(file))
    concatenate_datasets([table, table.select([0])]).to_parquet(str(file))
    loaded = load(written)
    assert [entry.reason for entry in loaded.broken][-1] == "query q0 skipped: its id has occurred before"
    assert len(loaded.data["queries"]) + loaded.skipped_queries == len(table) + 1


def test_a_line_separator_in_a_text_is_no_end_of_a_row(tmp_path):
    row = row_of("ActivityNetQA")
    file = tmp_path / row.annotation
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"question": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_table(row, DataRoot(tmp_path, offline=True)) == [{"question": "a\u2028b"}]


def test_a_copy_that_keeps_its_time_is_read_anew(write):
    written = write(row_of("ViDoRe_docvqa"))
    file = written.root / written.row.hub_id / "queries/test-00000-of-00001.parquet"
    facts = file.stat()
    assert load(written).data["queries"]["text"][0].endswith(": a")
    table = Dataset.from_parquet(str(file))
    table.map(lambda row: {"query": row["query"].upper()}, load_from_cache_file=False).to_parquet(str(file))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert load(written).data["queries"]["text"][0].endswith(": A")
