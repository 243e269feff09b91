"""A folder to search: words of the quickstart that its model has never seen, and a PDF of key/value pages.

The pictures are named by number, so that no file name gives an answer away.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipes.toy import scenes

WORDS, PAGES = 48, 6


def write_words(folder: str | Path, seed: int = 0) -> list[str]:
    """Draws the folder; returns the captions of the pictures `words/000.png`, `words/001.png`, ..."""
    root = Path(folder)
    (root / "words").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pool = scenes.words("test")
    captions = []
    for number, word in enumerate(rng.choice(pool, WORDS, replace=False)):
        scene = scenes.word_scene(rng, str(word))
        scene.image.save(root / "words" / f"{number:03}.png")
        captions.append(scene.caption)
    pages = [scenes.page_scene(rng, lambda: str(rng.choice(pool))).image for _ in range(PAGES)]
    # 144 dots per inch, at which pages are drawn again: every pixel stays what it is.
    pages[0].save(root / "pages.pdf", save_all=True, append_images=pages[1:], resolution=144)
    (root / "readme.txt").write_text("These pictures were drawn by the quickstart's own code.\n")
    return captions
