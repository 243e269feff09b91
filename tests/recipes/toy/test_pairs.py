"""Training and evaluation pairs: no leak between splits, right answers, scores against a known ranking."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.research.significance import measures
from recipes.toy import pairs, scenes


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_pairs_use_words_of_their_split_only(split):
    _, texts = pairs.captions(split, 40, 0)
    _, answers = pairs.questions(split, 40, 0)
    assert {text.split()[1] for text in texts} | set(answers) <= set(scenes.words(split))
    assert len(set(answers)) == 40, "each word once"


def test_more_pairs_than_words_repeat_words():
    size = len(scenes.words("validation")) + 5
    assert len(pairs.captions("validation", size, 0)[1]) == size


def test_questions_ask_for_their_answer():
    queries, answers = pairs.questions("test", 10, 3)
    for query, answer in zip(queries, answers, strict=True):
        key = query["text"].removeprefix("what ").removesuffix("?")
        assert key in scenes.KEYS and answer in scenes.words("test") and query["image"].size[0] == 224


def test_the_asked_value_is_not_always_on_the_same_line(monkeypatch):
    drawn = []
    page_scene = scenes.page_scene

    def spy(rng, draw_word):
        drawn.append(page_scene(rng, draw_word))
        return drawn[-1]

    monkeypatch.setattr(scenes, "page_scene", spy)
    _, answers = pairs.questions("test", 40, 0)
    lines = [[a for _, a in scene.questions].index(answer) for scene, answer in zip(drawn, answers, strict=True)]
    assert 10 < sum(line == 0 for line in lines) < 30 and set(lines) == {0, 1}


def test_train_dataset_columns():
    data = pairs.train_dataset(8, 0)
    assert data["captions"].column_names == data["questions"].column_names == ["query", "positive"]
    assert data["captions"][0]["query"].size == (112, 28)
    assert set(data["questions"][0]["query"]) == {"image", "text"}


def test_every_caption_is_searched_beside_the_same_word_in_another_ink():
    image_search, text_search, _ = pairs.searches("test", 12)
    assert len(image_search.queries) == 12 and len(image_search.documents) == len(text_search.documents) == 24
    assert len(set(image_search.documents)) == 24
    for mine, other in zip(image_search.documents[:12], image_search.documents[12:], strict=True):
        assert mine.split()[1] == other.split()[1] and mine.split()[0] != other.split()[0]
    colours = [np.asarray(picture).reshape(-1, 3).min(0) for picture in text_search.documents]
    assert all(np.abs(colours[n].astype(int) - colours[12 + n]).max() > 20 for n in range(12)), "the ink is drawn"


def test_ranks_of_an_oracle_and_of_a_constant(qwen):
    class Oracle:
        """Embeds the i-th query and the i-th document alike."""

        def encode_query(self, inputs, **kwargs):
            return np.eye(16)[: len(inputs)]

        encode_document = encode_query

    for search in pairs.searches("test", 8):
        assert measures(search.ranks(Oracle())) == {"hit@1": 100.0, "hit@10": 100.0, "MRR": 100.0}
    untrained = measures(pairs.searches("test", 40)[0].ranks(qwen))
    assert untrained["hit@1"] < 30 and 0 < untrained["MRR"] < 50
