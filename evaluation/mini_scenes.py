"""The pictures of the mini benchmark: words, icon grids, moving icons and pages, all sides multiples of 28 pixels.

One letter fills a 14 x 28 pixel cell and one icon 28 x 28, so that Qwen-VL processors keep every picture as it is. The
letters are matplotlib's DejaVu Sans Mono Bold, the icons qtawesome's Font Awesome 6, the words those of the Python
standard library's own sources (`mini_words.txt`). Pictures are stored as uncompressed PPM, so the same packages give
the same bytes on any machine.
"""

from __future__ import annotations

import io
import json
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, LINE = 14, 28
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
ICONS = tuple(
    (
        "anchor bell bolt bomb book bug car cat cloud crown cube dog eye fish flag frog ghost gift heart house "
        "key leaf lock moon plane plug ring rocket shield skull square star sun tag tree umbrella"
    ).split()
)
PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
SPLIT_RANGES = {"train": (60, 80), "validation": (80, 88), "test": (88, 100)}
"""Buckets of `bucket()` that belong to a split; 0 to 59 are left to whoever pre-trains a backbone on such scenes."""


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
    listed = (Path(__file__).parent / "mini_words.txt").read_text(encoding="utf-8").split()
    return tuple(word for word in listed if belongs(word, split))


@cache
def _glyph(font_path: str, size: int, text: str, width: int) -> np.ndarray:
    """Coverage of one letter or icon, (28, width) in 0..1."""
    # BASIC layout: with Raqm the result would depend on a library that only some Pillow builds have
    font = ImageFont.truetype(font_path, size, layout_engine=ImageFont.Layout.BASIC)
    mask = Image.new("L", (width, LINE))
    if width == LINE:
        ImageDraw.Draw(mask).text((LINE / 2, LINE / 2), text, fill=255, font=font, anchor="mm")
    else:
        ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
    return np.asarray(mask, np.float32) / 255


@cache
def _icon_font() -> tuple[str, dict[str, str]]:
    """Font file and name -> code point of Font Awesome 6."""
    spec = find_spec("qtawesome")  # found, not imported: importing it wants a Qt binding
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the icons of the mini benchmark come from qtawesome: pip install qtawesome")
    fonts = Path(spec.origin).parent / "fonts"
    charmap = json.loads(next(fonts.glob("fontawesome6-solid-*charmap*.json")).read_text(encoding="utf-8"))
    return str(next(fonts.glob("fontawesome6-solid-*.ttf"))), charmap


def letter(char: str) -> np.ndarray:
    """Coverage of a letter, (28, 14)."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return _glyph(str(path), 23, char, CELL)


def icon(name: str) -> np.ndarray:
    """Coverage of an icon, (28, 28)."""
    path, charmap = _icon_font()
    return _glyph(path, 22, chr(int(charmap[name], 16)), LINE)


def canvas(lines: int, cells: int) -> np.ndarray:
    """White paper of `lines` x `cells` letter cells, float32 (28 * lines, 14 * cells, 3)."""
    return np.full((lines * LINE, cells * CELL, 3), 255, np.float32)


def paint(pixels: np.ndarray, mask: np.ndarray, top: int, left: int, ink: str) -> None:
    """Blend `mask` in colour `ink` into `pixels`, in place."""
    area = pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
    area += mask[..., None] * (np.asarray(INKS[ink], np.float32) - area)


def ppm(pixels: np.ndarray) -> bytes:
    """The picture as PPM bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(buffer, "PPM")
    return buffer.getvalue()


def word_picture(word: str, ink: str, cell: int = 0) -> bytes:
    """One word on a 112 x 28 strip, its first letter at `cell`."""
    return page_picture([(word, cell)], ink, WORD_CELLS)


def page_picture(lines: list[tuple[str, int]], ink: str, cells: int = 2 * WORD_CELLS) -> bytes:
    """Lines of (text, first cell) under each other."""
    pixels = canvas(len(lines), cells)
    for number, (text, cell) in enumerate(lines):
        for offset, char in enumerate(text):
            if char != " ":
                paint(pixels, letter(char), number * LINE, (cell + offset) * CELL, ink)
    return ppm(pixels)


def grid_picture(cells: dict[tuple[int, int], tuple[str, str]]) -> bytes:
    """A 56 x 56 grid; place -> (ink, icon)."""
    pixels = canvas(2, 4)
    for (row, column), (ink, name) in cells.items():
        paint(pixels, icon(name), row * LINE, column * LINE, ink)
    return ppm(pixels)


def icon_picture(ink: str, name: str, top: int = LINE // 2, left: int = LINE // 2, shade: float = 1.0) -> bytes:
    """One icon on 56 x 56 paper, by default in the middle; `shade` fades it."""
    pixels = canvas(2, 4)
    paint(pixels, icon(name) * shade, top, left, ink)
    return ppm(pixels)
