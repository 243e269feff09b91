"""The mini benchmark: sizes, chance, splits without a leak, determinism, and an evaluator for training."""

from __future__ import annotations

import hashlib
import io
import random
from itertools import combinations
from pathlib import Path

import datasets
import mteb
import numpy as np
import pytest
from PIL import Image

from evaluation.chance import chance_level
from evaluation.dataset import GROUPS
from evaluation.mini import MINI, evaluator_for, mini_benchmark, scenes
from evaluation.mini import glyphs as mini_glyphs
from evaluation.mini.glyphs import draw_glyphs
from evaluation.mini.tasks import caption_of, draw_mini

CHANCE = {
    "I-CLS": (1 / 8 + 1 / 36) / 2,
    "I-QA": 0.1,
    "I-RET": 0.01,
    "I-VG": 1 / 8,
    "V-CLS": 1 / 8,
    "V-QA": 1 / 8,
    "V-RET": 0.01,
    "V-MRET": 1 / 8,
}
# the bytes of seed 0; another value on any machine, or after any upgrade, means that scores are no longer comparable
CHECKSUMS = {
    "train": "132dc12aee8554972108ffa6317d1d2bcf4b7dbc2c489b07365e900b5d2a0865",
    "validation": "aecf96e249501817e31e4c91e4041e048c2d0978504e3aff2a7387e72c75cb11",
    "test": "76b33b8ce746dbdff204bd416c9b3a01b57a3f98e8ae5da2a7aceba72a56d525",
}


def checksum(split: str) -> str:
    digest = hashlib.sha256()
    for row in MINI:
        data = draw_mini(row, split).data
        for part in ("queries", "corpus"):
            for record in data[part].with_format("arrow"):
                digest.update(repr(record.to_pylist()).encode())
        digest.update(repr([data["relevant_docs"], data["top_ranked"]]).encode())
    return digest.hexdigest()


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


@pytest.mark.parametrize("row", MINI, ids=lambda row: row.group)
def test_no_picture_or_video_occurs_in_two_splits(row):
    seen = {split: pictures(draw_mini(row, split).data) for split in ("train", "validation", "test")}
    assert all(len(found) >= 50 for found in seen.values())
    for a, b in combinations(seen, 2):
        assert not seen[a] & seen[b], f"{a} and {b} share media"


def test_words_belong_to_one_split_and_none_to_pretraining():
    listed = {split: set(scenes.words(split)) for split in scenes.SPLIT_RANGES}
    assert all(len(found) > 400 for found in listed.values())
    assert not any(a & b for a, b in combinations(listed.values(), 2))
    assert min(map(scenes.bucket, set().union(*listed.values()))) >= 60
    numbers = [set(scenes.digits(split)) for split in scenes.SPLIT_RANGES]
    assert all(len(found) > 100 for found in numbers) and not any(a & b for a, b in combinations(numbers, 2))


def test_captions_decide_the_split_of_a_grid():
    grid = {(0, 1): ("red", "key"), (0, 0): ("blue", "cat")}
    assert caption_of(grid) == "blue cat top left, red key top right"
    assert sum(scenes.belongs(caption_of(grid), split) for split in scenes.SPLIT_RANGES) <= 1


@pytest.mark.parametrize("split", CHECKSUMS)
def test_the_same_seed_gives_the_same_bytes_on_any_machine(split):
    assert checksum(split) == CHECKSUMS[split]


def test_another_seed_gives_other_pictures_of_the_same_split():
    first, second = (pictures(draw_mini(MINI[0], "test", seed).data) for seed in (0, 1))
    assert first != second


def test_the_stored_glyphs_are_those_of_the_fonts():
    """Drawn anew with whatever FreeType is here: edges may differ by a shade, shapes may not."""
    with Image.open(Path(mini_glyphs.__file__).with_name("glyphs.png")) as stored:
        there = np.asarray(stored, int)
    here = np.asarray(draw_glyphs(), int)
    assert there.shape == here.shape and np.abs(there - here).mean() < 4
    flipped = np.abs(there - here[:, ::-1]).mean()
    assert flipped > 40, "the comparison can tell glyphs apart"


def test_random_choices_follow_pythons_documented_sequence():
    draws = scenes.Draws(0, "a")
    source = random.Random("0 a")
    expected = [int(source.random() * 10) for _ in range(5)]
    assert [draws.below(10) for _ in range(5)] == expected
    assert sorted(scenes.Draws(1).sample("abcdef", 6)) == list("abcdef")
    assert {scenes.Draws(seed).pick("abc") for seed in range(20)} == set("abc")


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
