"""Scenes: splits without overlap, answers that follow from the pixels, equal pictures for equal seeds."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.toy import scenes


def rng(seed=0):
    return np.random.default_rng(seed)


def test_splits_share_no_word():
    parts = {split: set(scenes.words(split)) for split in scenes.SPLITS}
    listed = scenes.WORDS_FILE.read_text().split()
    assert sum(map(len, parts.values())) == len(set(listed)) == len(listed) > 7000
    assert all(len(word) <= scenes.WORD_CELLS for word in listed)
    assert len(parts["pretrain"]) > 0.55 * len(listed) and len(parts["test"]) > 500


def test_scenes_are_whole_merged_patches_and_repeatable():
    for draw in (
        lambda r: scenes.word_scene(r, "kitten"),
        lambda r: scenes.grid_scene(r, "train"),
        lambda r: scenes.page_scene(r, lambda: "kitten"),
    ):
        first, again, other = draw(rng()), draw(rng()), draw(rng(1))
        assert np.array_equal(first.pixels, again.pixels) and first.caption == again.caption
        assert first.pixels.shape != other.pixels.shape or not np.array_equal(first.pixels, other.pixels)
        assert first.pixels.dtype == np.uint8 and all(side % 28 == 0 for side in first.pixels.shape[:2])
        assert first.image.size == first.pixels.shape[1::-1]


def test_a_word_is_written_letter_by_letter_in_its_ink():
    scene = scenes.word_scene(rng(), "cab")
    colour = scene.caption.split()[0]
    assert dict(scene.questions) == {"what word?": "cab", "what colour?": colour}
    used = np.unique(np.abs(scene.pixels.astype(int) - scenes.PAPER).sum(-1).nonzero()[1] // scenes.CELL_WIDTH)
    assert len(used) == 3 and used[-1] - used[0] == 2
    darkest = scene.pixels.reshape(-1, 3)[scene.pixels.reshape(-1, 3).astype(int).sum(-1).argmin()]
    np.testing.assert_allclose(darkest, scenes.INKS[colour], atol=3)


def test_grid_answers_follow_from_the_pixels():
    for seed in range(20):
        scene = scenes.grid_scene(rng(seed), "test")
        assert scenes.split_of(scene.caption) == "test"
        answers = dict(scene.questions)
        count = 0
        for (row, column), place in scenes.PLACES.items():
            cell = scene.pixels[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28].astype(int)
            inked = np.abs(cell - scenes.PAPER).sum() > 0
            count += inked
            assert inked == (f"what is {place}?" in answers)
            if inked:
                ink = answers[f"what colour is {place}?"]
                assert answers[f"where is {ink}?"] == place
                assert np.abs(cell - scenes.INKS[ink]).sum(-1).min() < 10
        assert answers["how many?"] == str(count)


def test_pages_answer_by_key():
    values = iter(["one", "two", "three"])
    scene = scenes.page_scene(rng(), lambda: next(values))
    answers = [a for q, a in scene.questions if q != "what colour?"]
    assert answers == ["one", "two", "three"][: len(answers)] and scene.pixels.shape == (28 * len(answers), 224, 3)


def test_the_word_list_is_made_by_the_command():
    collected = scenes.collect_words()
    assert len(set(collected) & set(scenes.WORDS_FILE.read_text().split())) > 6000


def test_unknown_icons_are_an_error():
    with pytest.raises(KeyError):
        scenes._icon("no such icon")
