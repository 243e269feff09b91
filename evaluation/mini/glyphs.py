"""The letters and icons of the mini benchmark as one stored picture, `glyphs.png`.

Drawn once, from matplotlib's DejaVu Sans Mono Bold (Bitstream Vera licence) and qtawesome's Font Awesome 6 Free Solid
(SIL OFL 1.1), and stored, because two machines with other versions of FreeType, Pillow or the fonts would draw other
pixels. Redraw it, which makes a new version of the benchmark, with

    python -m evaluation.mini.glyphs
"""

from __future__ import annotations

import json
import string
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, LINE = 14, 28  # a letter is 14 x 28 pixels, an icon 28 x 28
ICONS = tuple(
    (
        "anchor bell bolt bomb book bug car cat cloud crown cube dog eye fish flag frog ghost gift heart house "
        "key leaf lock moon plane plug ring rocket shield skull square star sun tag tree umbrella"
    ).split()
)
_FILE = Path(__file__).with_name("glyphs.png")


@cache
def _stored() -> dict[str, np.ndarray]:
    """Letter or icon name -> coverage in 0..1, (28, width); the order in the file is a-z, then `ICONS`."""
    with Image.open(_FILE) as picture:
        pixels = np.asarray(picture, np.float32) / 255
    glyphs, left = {}, 0
    for name in (*string.ascii_lowercase, *ICONS):
        width = CELL if len(name) == 1 else LINE
        glyphs[name] = pixels[:, left : left + width]
        left += width
    return glyphs


def glyph(name: str) -> np.ndarray:
    """Coverage of a letter (28, 14) or of an icon (28, 28), float32 in 0..1."""
    return _stored()[name]


def draw_glyphs() -> Image.Image:
    """All letters and icons side by side, drawn anew from the installed fonts."""
    mono = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    letters = ImageFont.truetype(str(mono), 23)
    spec = find_spec("qtawesome")  # found, not imported: importing it wants a Qt binding
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the icons come from qtawesome: pip install qtawesome")
    fonts = Path(spec.origin).parent / "fonts"
    charmap = json.loads(next(fonts.glob("fontawesome6-solid-*charmap*.json")).read_text(encoding="utf-8"))
    icons = ImageFont.truetype(str(next(fonts.glob("fontawesome6-solid-*.ttf"))), 22)
    sheet = Image.new("L", (CELL * len(string.ascii_lowercase) + LINE * len(ICONS), LINE))
    for position, letter in enumerate(string.ascii_lowercase):
        cell = Image.new("L", (CELL, LINE))  # of its own: a letter must not reach into its neighbour
        ImageDraw.Draw(cell).text((0, 0), letter, fill=255, font=letters)
        sheet.paste(cell, (position * CELL, 0))
    start = CELL * len(string.ascii_lowercase)
    for position, name in enumerate(ICONS):
        cell = Image.new("L", (LINE, LINE))
        ImageDraw.Draw(cell).text((LINE / 2, LINE / 2), chr(int(charmap[name], 16)), fill=255, font=icons, anchor="mm")
        sheet.paste(cell, (start + position * LINE, 0))
    return sheet


if __name__ == "__main__":
    draw_glyphs().save(_FILE, optimize=True)
