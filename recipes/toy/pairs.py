"""Pairs to train and score an embedder on, drawn from the scenes: captions of words, answers to questions about pages.

`captions`: the picture of a coloured word -> "red kitten". `questions`: a page of key/value lines with "what city?" ->
the value, where the page's other values are candidates too. Searched among the captions is every word in a second ink
too, so that a model has to know the letters and the ink. Words come from one split only, so nothing a model is
scored on was drawn in pre-training or training.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict, Image, Value
from PIL import Image as PILImage

from recipes.data.searches import Search
from recipes.toy import scenes


def captions(split: str, size: int, seed: int) -> tuple[list[PILImage.Image], list[str]]:
    """Pictures of `size` words of a split, each word once while they last, and their captions."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.word_scene(rng, word) for word in _words(rng, split, size)]
    return [scene.image for scene in drawn], [scene.caption for scene in drawn]


def in_another_ink(texts: list[str], seed: int) -> tuple[list[PILImage.Image], list[str]]:
    """The same words, each in another ink than its caption says: pictures and captions."""
    rng = np.random.default_rng(seed)
    drawn = []
    for text in texts:
        ink, word = text.split(" ")
        drawn.append(scenes.word_scene(rng, word, [other for other in scenes.INKS if other != ink]))
    return [scene.image for scene in drawn], [scene.caption for scene in drawn]


def questions(split: str, size: int, seed: int) -> tuple[list[dict[str, PILImage.Image | str]], list[str]]:
    """Pages with a question each, and the asked values."""
    rng = np.random.default_rng(seed)
    pool = scenes.words(split)
    queries, answers = [], []
    for word in _words(rng, split, size):
        # on either of the first two lines: always on the first, it could be found without reading the question
        values = [str(w) for w in rng.choice(pool, 8) if w != word][:2]
        values.insert(int(rng.integers(2)), word)  # a page has two or three lines
        scene = scenes.page_scene(rng, iter(values).__next__)
        question, answer = next((q, a) for q, a in scene.questions if a == word)
        queries.append({"image": scene.image, "text": question})
        answers.append(answer)
    return queries, answers


def _words(rng: np.random.Generator, split: str, size: int) -> list[str]:
    pool = scenes.words(split)
    rounds = -(-size // len(pool))
    return [str(pool[i]) for _ in range(rounds) for i in rng.permutation(len(pool))][:size]


def train_dataset(size: int, seed: int) -> DatasetDict:
    """Both kinds of pairs from the `train` split, `size` each, columns `query` and `positive`."""
    images, texts = captions("train", size, seed)
    pages, answers = questions("train", size, seed + 1)
    picture = Dataset.from_dict({"query": images, "positive": texts}).cast_column("query", Image())
    asked = Dataset.from_dict({"query": pages, "positive": answers})
    asked = asked.cast_column("query", {"image": Image(), "text": Value("string")})
    return DatasetDict({"captions": picture, "questions": asked})


def searches(split: str, size: int | None = None, seed: int = 7) -> list[Search]:
    """Search in both directions and question answering over the words of a split (all of them by default)."""
    size = size or len(scenes.words(split))
    images, texts = captions(split, size, seed)
    other_images, other_texts = in_another_ink(texts, seed + 2)
    pages, answers = questions(split, size, seed + 1)
    right = [{number} for number in range(size)]
    return [
        Search("image -> text", images, texts + other_texts, right, batch_size=64),
        Search("text -> image", texts, images + other_images, right, batch_size=64),
        Search("image + question -> answer", pages, answers, right, batch_size=64),
    ]
