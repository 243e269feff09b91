"""The contents and pictures of the mini benchmark: words, icons, handwritten digits, pages; all sides are 28s.

The words are those of the Python standard library's own sources (`words.txt`), letters and icons are stored
pictures (`glyphs.py`), the digits scikit-learn's `load_digits`. Everything is drawn with integers from files and
from `Draws`, so the same seed gives the same bytes on any machine, whatever its fonts, Pillow or numpy.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from sklearn.datasets import load_digits

from evaluation.mini.glyphs import CELL, LINE, glyph

T = TypeVar("T")
WORD_CELLS = 8
INKS = {
    "red": (214, 39, 40),
    "green": (30, 140, 50),
    "blue": (31, 80, 200),
    "orange": (255, 140, 0),
    "purple": (140, 60, 190),
    "pink": (240, 110, 190),
    "brown": (125, 75, 30),
    "black": (0, 0, 0),
}
PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
SPLIT_RANGES = {"train": (60, 80), "validation": (80, 88), "test": (88, 100)}
"""Buckets of `bucket()` that belong to a split; 0 to 59 are left to whoever pre-trains a backbone on such scenes."""
Cells = dict[tuple[int, int], tuple[str, str]]
"""A 2 x 2 grid: place -> (ink, icon)."""


class Draws:
    """Random choices that never change: Python documents that `Random(str).random()` keeps its sequence.

    numpy makes that promise for no method, nor does Python for its other methods.

    Args:
        *names: What the sequence is for: seed, data set, split.
    """

    def __init__(self, *names: object) -> None:
        self._random = random.Random(" ".join(map(str, names)))

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        return int(self._random.random() * limit)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options, in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def bucket(content: str) -> int:
    """Bucket 0 to 99 of a word or layout, by its own hash: the split of a content is the same everywhere."""
    return zlib.crc32(content.encode()) % 100


def belongs(content: str, split: str) -> bool:
    """Whether a word or layout is in `split`."""
    low, high = SPLIT_RANGES[split]
    return low <= bucket(content) < high


@cache
def words(split: str) -> tuple[str, ...]:
    """The words (3 to 8 letters, sorted) of one split."""
    listed = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()
    return tuple(word for word in listed if belongs(word, split))


@cache
def digits(split: str) -> tuple[int, ...]:
    """Numbers of the handwritten digits of one split."""
    return tuple(number for number in range(len(_digit_images())) if belongs(f"digit {number}", split))


@cache
def _digit_images() -> np.ndarray:
    """(1797, 8, 8) with values 0 to 16."""
    return load_digits().images


def _blend(pixels: np.ndarray, mask: np.ndarray, top: int, left: int, ink: str) -> None:
    """Blend `mask` in colour `ink` into `pixels`, in place."""
    area = pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
    area += mask[..., None] * (np.asarray(INKS[ink], np.float32) - area)


def _paper(lines: int, cells: int) -> np.ndarray:
    """White paper of `lines` x `cells` letter cells, float32 (28 * lines, 14 * cells, 3)."""
    return np.full((lines * LINE, cells * CELL, 3), 255, np.float32)


def _ppm(pixels: np.ndarray) -> bytes:
    """The picture as PPM bytes."""
    height, width, _ = pixels.shape
    return f"P6\n{width} {height}\n255\n".encode() + pixels.round().astype(np.uint8).tobytes()


def word_picture(word: str, ink: str, cell: int = 0, shade: float = 1.0) -> bytes:
    """One word on a 112 x 28 strip, its first letter at `cell`; `shade` fades it."""
    return page_picture([(word, cell)], ink, WORD_CELLS, shade)


def page_picture(lines: Sequence[tuple[str, int]], ink: str, cells: int = 2 * WORD_CELLS, shade: float = 1.0) -> bytes:
    """Lines of (text, first cell) under each other."""
    pixels = _paper(len(lines), cells)
    for number, (text, cell) in enumerate(lines):
        for offset, char in enumerate(text):
            if char != " ":
                _blend(pixels, glyph(char) * np.float32(shade), number * LINE, (cell + offset) * CELL, ink)
    return _ppm(pixels)


def grid_picture(cells: Cells) -> bytes:
    """A 56 x 56 grid of icons."""
    pixels = _paper(2, 4)
    for (row, column), (ink, name) in cells.items():
        _blend(pixels, glyph(name), row * LINE, column * LINE, ink)
    return _ppm(pixels)


def icon_picture(ink: str, name: str, top: int = LINE // 2, left: int = LINE // 2) -> bytes:
    """One icon on 56 x 56 paper, by default in the middle."""
    pixels = _paper(2, 4)
    _blend(pixels, glyph(name), top, left, ink)
    return _ppm(pixels)


def digit_picture(number: int, ink: str, top: int, left: int) -> bytes:
    """One handwritten digit, 24 x 24, on 56 x 56 paper."""
    pixels = _paper(2, 4)
    mask = (_digit_images()[number] / 16).astype(np.float32).repeat(3, axis=0).repeat(3, axis=1)
    _blend(pixels, mask, top, left, ink)
    return _ppm(pixels)
