"""Small scenes with exact answers: rendered words, icon grids and key/value pages.

Every scene is an image (uint8 RGB array, sides in multiples of 28 px so that Qwen-VL processors keep it as it is)
with a caption and questions whose answers follow from the picture alone. All of it is made from what packages ship:
the letters are matplotlib's DejaVu Sans Mono, the icons qtawesome's Font Awesome 6, the words those of the Python
standard library's own sources (`words.txt`, written by `python -m recipes.toy.scenes`).

Words are split once, by a hash of the word itself, into `pretrain`, `train`, `validation` and `test`; icon grids and
pages take their split the same way from their content. A word seen in one split is never drawn in another.
"""

from __future__ import annotations

import json
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL_WIDTH, LINE_HEIGHT = 14, 28  # one letter: half a merged Qwen2-VL token wide, one tall
WORD_CELLS = 8
PAPER = (255, 255, 255)
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
ICONS = (
    "anchor bell bolt bomb book bug car cat cloud crown cube dog eye fish flag frog ghost gift heart house "
    "key leaf lock moon plane plug ring rocket shield skull square star sun tag tree umbrella"
).split()
KEYS = "name city item code team boss road room tool file".split()
PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
WORDS_FILE = Path(__file__).parent / "words.txt"
SPLITS = ("pretrain", "train", "validation", "test")


@dataclass(frozen=True)
class Scene:
    """One picture: `pixels` (height, width, 3) uint8, a `caption`, and (question, answer) pairs about it."""

    pixels: np.ndarray
    caption: str
    questions: tuple[tuple[str, str], ...]

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.pixels)


def split_of(text: str) -> str:
    """Split of a word or layout by its own hash: 60 % pretrain, 20 % train, 8 % validation, 12 % test."""
    bucket = zlib.crc32(text.encode()) % 100
    return SPLITS[0] if bucket < 60 else SPLITS[1] if bucket < 80 else SPLITS[2] if bucket < 88 else SPLITS[3]


@cache
def words(split: str) -> tuple[str, ...]:
    """The words (3-8 letters, sorted) of one split."""
    listed = WORDS_FILE.read_text().split()
    return tuple(word for word in listed if split_of(word) == split)


@cache
def _letter(char: str) -> np.ndarray:
    """Coverage mask of one letter, (28, 14) in 0..1."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    mask = Image.new("L", (CELL_WIDTH, LINE_HEIGHT))
    ImageDraw.Draw(mask).text((0, 0), char, fill=255, font=ImageFont.truetype(str(path), 23))
    return np.asarray(mask, np.float32) / 255


@cache
def _icon(name: str) -> np.ndarray:
    """Coverage mask of one icon, (28, 28) in 0..1."""
    spec = find_spec("qtawesome")  # found, not imported: importing it wants a Qt binding
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the icons come from qtawesome: pip install qtawesome")
    fonts = Path(spec.origin).parent / "fonts"
    charmap = json.loads(next(fonts.glob("fontawesome6-solid-*charmap*.json")).read_text())
    mask = Image.new("L", (LINE_HEIGHT, LINE_HEIGHT))
    font = ImageFont.truetype(str(next(fonts.glob("fontawesome6-solid-*.ttf"))), 22)
    glyph = chr(int(charmap[name], 16))
    ImageDraw.Draw(mask).text((LINE_HEIGHT / 2, LINE_HEIGHT / 2), glyph, fill=255, font=font, anchor="mm")
    return np.asarray(mask, np.float32) / 255


def _paint(pixels: np.ndarray, mask: np.ndarray, row: int, column: int, ink: str) -> None:
    """Blend `mask` in colour `ink` into float `pixels` with its top left corner at (row, column), in place."""
    area = pixels[row : row + mask.shape[0], column : column + mask.shape[1]]
    area += mask[..., None] * (np.asarray(INKS[ink], np.float32) - area)


def _canvas(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), PAPER, np.float32)


def _write(pixels: np.ndarray, text: str, line: int, cell: int, ink: str) -> None:
    for offset, char in enumerate(text):
        _paint(pixels, _letter(char), line * LINE_HEIGHT, (cell + offset) * CELL_WIDTH, ink)


def word_scene(rng: np.random.Generator, word: str, inks: Sequence[str] = tuple(INKS)) -> Scene:
    """One word of at most 8 letters in one of the inks, at a random cell of a 112 x 28 px strip."""
    ink = str(rng.choice(list(inks)))
    pixels = _canvas(LINE_HEIGHT, WORD_CELLS * CELL_WIDTH)
    _write(pixels, word, 0, int(rng.integers(0, WORD_CELLS - len(word) + 1)), ink)
    questions = (("what word?", word), ("what colour?", ink))
    return Scene(pixels.round().astype(np.uint8), f"{ink} {word}", questions)


def grid_scene(rng: np.random.Generator, split: str) -> Scene:
    """Two to four icons in different inks on a 2 x 2 grid (56 x 56 px); the layout belongs to `split`."""
    while True:
        places = sorted(tuple(map(int, divmod(p, 2))) for p in rng.permutation(4)[: rng.integers(2, 5)])
        icons = [str(name) for name in rng.choice(ICONS, len(places), replace=False)]
        inks = [str(name) for name in rng.choice(list(INKS), len(places), replace=False)]
        caption = ", ".join(f"{i} {n} {PLACES[p]}" for p, n, i in zip(places, icons, inks, strict=True))
        if split_of(caption) == split:
            break
    pixels = _canvas(2 * LINE_HEIGHT, 2 * LINE_HEIGHT)
    for (row, column), name, ink in zip(places, icons, inks, strict=True):
        _paint(pixels, _icon(name), row * LINE_HEIGHT, column * LINE_HEIGHT, ink)
    questions = [("how many?", str(len(places)))]
    for place, name, ink in zip(places, icons, inks, strict=True):
        questions += [
            (f"what is {PLACES[place]}?", f"{ink} {name}"),
            (f"what colour is {PLACES[place]}?", ink),
            (f"where is {ink}?", PLACES[place]),
        ]
    return Scene(pixels.round().astype(np.uint8), caption, tuple(questions))


def page_scene(rng: np.random.Generator, draw_word: Callable[[], str]) -> Scene:
    """A page of two or three key/value lines (224 px wide); `draw_word` supplies the values."""
    keys = [str(key) for key in rng.choice(KEYS, rng.integers(2, 4), replace=False)]
    values = [draw_word() for _ in keys]
    ink = str(rng.choice(list(INKS)))
    pixels = _canvas(len(keys) * LINE_HEIGHT, 2 * WORD_CELLS * CELL_WIDTH)
    for line, (key, value) in enumerate(zip(keys, values, strict=True)):
        _write(pixels, key, line, 0, ink)
        _write(pixels, value, line, WORD_CELLS, ink)
    questions = tuple((f"what {key}?", value) for key, value in zip(keys, values, strict=True))
    caption = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return Scene(pixels.round().astype(np.uint8), caption, (*questions, ("what colour?", ink)))


def draw(rng: np.random.Generator, kind: str, split: str, draw_word: Callable[[], str]) -> Scene:
    """A scene of one kind; `draw_word` supplies its words."""
    if kind == "word":
        return word_scene(rng, draw_word())
    return page_scene(rng, draw_word) if kind == "page" else grid_scene(rng, split)


def collect_words() -> list[str]:
    """Words of 3-8 letters that occur at least twice in the standard library's sources and documentation topics."""
    from pydoc_data import topics

    counts = Counter(w for text in topics.topics.values() for w in re.findall(r"\b[a-z]{3,8}\b", text))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if not {"site-packages", "test", "tests"} & set(path.parts):
            counts.update(re.findall(r"\b[a-z]{3,8}\b", path.read_text(errors="ignore")))
    return sorted(word for word, count in counts.items() if count >= 2)


if __name__ == "__main__":
    WORDS_FILE.write_text("\n".join(collect_words()) + "\n")
