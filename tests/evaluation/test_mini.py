"""The mini benchmark: sizes, chance, splits without a leak, determinism, and an evaluator for training."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import combinations

import datasets
import mteb
import numpy as np
import pytest
from PIL import Image

from evaluation import mini_scenes as scenes
from evaluation.chance import chance_level
from evaluation.mini import GROUPS, MINI, caption_of, draw_mini, evaluator_for, mini_benchmark

CHANCE = {
    "I-CLS": 1 / 36,
    "I-QA": 0.1,
    "I-RET": 0.01,
    "I-VG": 1 / 8,
    "V-CLS": 1 / 6,
    "V-QA": 1 / 8,
    "V-RET": 0.01,
    "V-MRET": 1 / 8,
}
DIGEST = """
import hashlib
from evaluation.mini import MINI, draw_mini
digest = hashlib.sha256()
for row in MINI:
    data = draw_mini(row, "validation").data
    for part in ("queries", "corpus"):
        for record in data[part].with_format("arrow"):
            digest.update(repr(record.to_pylist()).encode())
    digest.update(repr([data["relevant_docs"], data["top_ranked"]]).encode())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("row", MINI, ids=lambda row: row.group)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_split_has_100_queries_and_the_stated_chance(row, split):
    loaded = draw_mini(row, split)
    assert len(loaded.data["queries"]) == 100 and not loaded.broken
    chance = chance_level(loaded.data, row.metric)
    assert chance == pytest.approx(CHANCE[row.group]) if row.group in CHANCE else 0.015 < chance < 0.04


def test_the_nine_rows_mirror_the_groups():
    assert [row.group for row in MINI] == list(GROUPS)
    benchmark = mini_benchmark()
    assert [task.metadata.name for task in benchmark.tasks] == [f"mini-1.{group}.test" for group in GROUPS]
    assert mini_benchmark(seed=7).tasks[0].metadata.name == "mini-1.I-CLS.test.seed7"
    assert len(mini_benchmark(groups=["video", "VisDoc"]).tasks) == 5


@pytest.mark.parametrize("row", MINI, ids=lambda row: row.group)
def test_an_oracle_scores_one(row, oracle):
    benchmark = mini_benchmark("validation", groups=[row.group])
    task = benchmark.tasks[0]
    task.load_data()
    encoder = oracle(task.dataset["default"]["validation"])
    result = mteb.evaluate(encoder, benchmark, cache=None, co2_tracker=False, show_progress_bar=False)
    scores = result.task_results[0].scores["validation"][0]
    assert scores["main_score"] == 1.0 and scores["split_label"] == "mini-1/validation"


def pictures(data) -> set[bytes]:
    found = set()
    for part in ("queries", "corpus"):
        for record in data[part].with_format(None).cast_column("image", _bytes()) if _has_image(data[part]) else []:
            found |= {record["image"]["bytes"]} if record["image"] else set()
        for record in data[part].with_format(None) if "video" in data[part].column_names else []:
            found |= {b"".join(record["video"])} if record["video"] else set()
    return found


def _bytes():
    return datasets.Image(decode=False)


def _has_image(dataset) -> bool:
    return "image" in dataset.column_names


@pytest.mark.parametrize("row", [row for row in MINI if row.group != "I-VG"], ids=lambda row: row.group)
def test_no_picture_or_video_occurs_in_two_splits(row):
    """I-VG's crops are single icons, the same in all splits by design; its query grids are checked below."""
    seen = {split: pictures(draw_mini(row, split).data) for split in ("train", "validation", "test")}
    assert all(len(found) >= 50 for found in seen.values())
    for a, b in combinations(seen, 2):
        assert not seen[a] & seen[b], f"{a} and {b} share media"


def test_query_grids_of_grounding_are_disjoint():
    row = next(row for row in MINI if row.group == "I-VG")
    seen = [pictures({"queries": draw_mini(row, s).data["queries"], "corpus": _empty()}) for s in scenes.SPLIT_RANGES]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def _empty():
    return datasets.Dataset.from_dict({"id": []})


def test_words_belong_to_one_split_and_none_to_pretraining():
    listed = {split: set(scenes.words(split)) for split in scenes.SPLIT_RANGES}
    assert all(len(found) > 400 for found in listed.values())
    assert not any(a & b for a, b in combinations(listed.values(), 2))
    everything = (set().union(*listed.values()), {w for w in listed["test"] if scenes.bucket(w) < 88})
    assert min(map(scenes.bucket, everything[0])) >= 60 and not everything[1]


def test_captions_decide_the_split_of_a_grid():
    grid = {(0, 1): ("red", "key"), (0, 0): ("blue", "cat")}
    assert caption_of(grid) == "blue cat top left, red key top right"
    assert sum(scenes.belongs(caption_of(grid), split) for split in scenes.SPLIT_RANGES) <= 1


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    there = subprocess.run([sys.executable, "-c", DIGEST], check=True, capture_output=True, text=True).stdout
    here = io.StringIO()
    with redirect_stdout(here):
        exec(DIGEST, {})
    assert here.getvalue() == there and len(there.strip()) == 64
    row = MINI[0]
    texts = [pictures(draw_mini(row, "test", seed).data) for seed in (0, 1)]
    assert texts[0] != texts[1]


def test_pictures_have_sides_of_28_pixels_and_visible_ink():
    for data in (scenes.word_picture("word", "red", 2), scenes.icon_picture("blue", "cat"), scenes.page_picture([("a b", 0)], "black")):  # fmt: skip  # noqa: E501
        image = Image.open(io.BytesIO(data))
        assert image.width % 28 == 0 and image.height % 28 == 0
        pixels = np.asarray(image)
        assert (pixels == 255).all(-1).mean() > 0.5 and (pixels < 100).any()


def test_a_test_split_never_becomes_an_evaluator():
    with pytest.raises(ValueError, match="test split must not choose a model"):
        evaluator_for("mini", split="test")
    with pytest.raises(ValueError, match="mmeb-v2.*has no validation split"):
        evaluator_for("mmeb-v2")
    with pytest.raises(ValueError, match="split must be one of"):
        mini_benchmark("dev")
    with pytest.raises(ValueError, match="unknown group"):
        mini_benchmark(groups=["X"])
