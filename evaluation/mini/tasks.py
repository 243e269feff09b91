"""How the nine data sets of the mini benchmark are drawn: a function per meta-task fills a `SplitBuilder`.

Words, digits and grids come from the asked split only. Queries have a number as id, candidates the content they show.
"""

from __future__ import annotations

from collections.abc import Callable

from evaluation.dataset import MMEBDataset
from evaluation.mini import scenes
from evaluation.mini.glyphs import ICONS
from evaluation.mini.scenes import INKS, PLACES, Cells, Draws
from evaluation.pool import Item, LoadedDataset, SplitBuilder

NUM_QUERIES = 100
KEYS = tuple("name city item code team boss road room tool file".split())
_INKS, _PLACES = tuple(INKS), tuple(PLACES)
Coloured = tuple[str, str]
"""A word, or an icon, and its ink: `("red", "kitten")`."""


def caption_of(cells: Cells) -> str:
    """The content of a grid, which decides its split: `red key top left, blue cat bottom right`."""
    return ", ".join(f"{ink} {name} {PLACES[place]}" for place, (ink, name) in sorted(cells.items()))


def _grid(draws: Draws, split: str) -> Cells:
    """Four different icons whose layout belongs to `split`."""
    while True:
        cells = {place: (draws.pick(_INKS), name) for place, name in zip(_PLACES, draws.sample(ICONS, 4), strict=True)}
        if scenes.belongs(caption_of(cells), split):
            return cells


def _coloured(draws: Draws, split: str, count: int) -> list[Coloured]:
    """Different words, each in some ink."""
    return [(draws.pick(_INKS), word) for word in draws.sample(scenes.words(split), count)]


def _strip(draws: Draws, ink: str, word: str) -> bytes:
    """The word somewhere on its strip."""
    return scenes.word_picture(word, ink, draws.below(scenes.WORD_CELLS + 1 - len(word)))


def _page(draws: Draws, lines: list[tuple[str, str]]) -> bytes:
    """Lines of key and value, in one ink."""
    return scenes.page_picture([(f"{key:<{scenes.WORD_CELLS}}{value}", 0) for key, value in lines], draws.pick(_INKS))


def _film(*pictures: bytes) -> tuple[bytes, ...]:
    """Two frames of each picture."""
    return tuple(picture for picture in pictures for _ in range(2))


def _inks_and_icons(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """Half words, to be named by their ink, half icons, to be named."""
    inks, names = [Item(ink, ink) for ink in INKS], [Item(name, name) for name in ICONS]
    for index, (ink, word) in enumerate(_coloured(draws, split, NUM_QUERIES // 2)):
        builder.ask(index, Item(word, "", image=_strip(draws, ink, word)), {ink: 1}, inks)
    index = NUM_QUERIES // 2
    seen: set[str] = set()
    while index < NUM_QUERIES:
        cells = {draws.pick(_PLACES): (draws.pick(_INKS), draws.pick(ICONS))}
        content = caption_of(cells)
        if scenes.belongs(content, split) and content not in seen:
            seen.add(content)
            name = next(iter(cells.values()))[1]
            builder.ask(index, Item(content, "", image=scenes.grid_picture(cells)), {name: 1}, names)
            index += 1


def _questions(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """Half pages of three lines, asked for a value, half grids of four icons, asked for a place."""
    for index in range(NUM_QUERIES // 2):
        values, keys, line = draws.sample(scenes.words(split), 10), draws.sample(KEYS, 3), draws.below(3)
        picture = _page(draws, list(zip(keys, values[:3], strict=True)))
        query = Item(" ".join(values), f"what {keys[line]}?", image=picture)
        builder.ask(index, query, {values[line]: 1}, [Item(value, value) for value in values])
    for index in range(NUM_QUERIES // 2, NUM_QUERIES):
        cells = _grid(draws, split)
        place = draws.pick(_PLACES)
        shown = [" ".join(cell) for cell in cells.values()]
        ink, name = cells[place]
        others = [f"{other} {name}" for other in draws.sample([i for i in _INKS if i != ink], 3)]
        others += [f"{ink} {other}" for other in draws.sample([n for n in ICONS if n not in " ".join(shown)], 3)]
        query = Item(caption_of(cells), f"what is {PLACES[place]}?", image=scenes.grid_picture(cells))
        builder.ask(index, query, {f"{ink} {name}": 1}, [Item(answer, answer) for answer in (*shown, *others)])


def _words_and_digits(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """Half texts, for the picture of a word that is there in two inks; half handwritten digits, for the same one."""
    queries: list[tuple[Item, str]] = []
    for word in draws.sample(scenes.words(split), NUM_QUERIES // 4):
        for ink in draws.sample(_INKS, 2):
            content = f"{ink} {word}"
            builder.offer(len(queries), Item(content, "", image=_strip(draws, ink, word)))
            queries.append((Item(content, content), content))
    for number in draws.sample(scenes.digits(split), NUM_QUERIES // 2):
        shown = scenes.digit_picture(number, draws.pick(_INKS), 14, 14)
        asked = scenes.digit_picture(number, draws.pick(_INKS), 14 + draws.below(3), 14 + draws.below(3))
        builder.offer(len(queries), Item(f"digit {number}", "", image=shown))
        queries.append((Item(f"digit {number}", "", image=asked), f"digit {number}"))
    for index, (query, content) in enumerate(queries):
        builder.ask(index, query, {content: 1})


def _crops(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """A page of three lines and a key, for the picture of the value; eight words."""
    for index in range(NUM_QUERIES):
        words, keys, line = _coloured(draws, split, 8), draws.sample(KEYS, 3), draws.below(3)
        picture = _page(draws, [(key, word) for key, (_, word) in zip(keys, words, strict=False)])
        own = [Item(" ".join(word), "", image=scenes.word_picture(word[1], word[0])) for word in words]
        query = Item(str(index), f"what {keys[line]}?", image=picture)
        builder.ask(index, query, {own[line].key: 1}, own)


def _moving_words(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """A word that moves to the right; its ink is the class."""
    for ink in INKS:
        builder.offer(0, Item(ink, ink))
    for index, (ink, word) in enumerate(_coloured(draws, split, NUM_QUERIES)):
        video = tuple(scenes.word_picture(word, ink, min(step, scenes.WORD_CELLS - len(word))) for step in range(4))
        builder.ask(index, Item(word, "", video=video), {ink: 1})


def _video_questions(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """Three words in different inks one after another, asked for the word of one ink; eight words."""
    for index in range(NUM_QUERIES):
        words, inks, asked = draws.sample(scenes.words(split), 8), draws.sample(_INKS, 3), draws.below(3)
        video = _film(*(scenes.word_picture(word, ink) for word, ink in zip(words, inks, strict=False)))
        query = Item(" ".join(words), f"what is {inks[asked]}?", video=video)
        builder.ask(index, query, {words[asked]: 1}, [Item(word, word) for word in words])


def _videos(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """A description of two words in order; every pair is there in both orders."""
    words = _coloured(draws, split, NUM_QUERIES)
    pairs = [pair for first, second in zip(words[::2], words[1::2], strict=True) for pair in ((first, second),) * 2]
    contents = [pair[::-1] if number % 2 else pair for number, pair in enumerate(pairs)]
    captions = [", ".join(" ".join(word) for word in content) for content in contents]
    for index, (caption, content) in enumerate(zip(captions, contents, strict=True)):
        video = _film(*(scenes.word_picture(word, ink) for ink, word in content))
        builder.offer(index, Item(caption, "", video=video))
    for index, caption in enumerate(captions):
        builder.ask(index, Item(caption, caption), {caption: 1})


def _moments(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """A video of four words and the description of one, for its clip; the clips of four other words stand beside."""
    for index in range(NUM_QUERIES):
        words, asked = _coloured(draws, split, 8), draws.below(4)
        frames = [scenes.word_picture(word, ink) for ink, word in words]
        clips = [Item(" ".join(word), "", video=_film(_strip(draws, *word))) for word in words]
        query = Item(str(index), clips[asked].key, video=_film(*frames[:4]))
        builder.ask(index, query, {clips[asked].key: 1}, clips)


def _pages(builder: SplitBuilder, split: str, draws: Draws) -> None:
    """100 pages in 50 pairs that share one value under different keys."""
    values = draws.sample(scenes.words(split), 150)
    asked = []
    for pair in range(NUM_QUERIES // 2):
        shared, keys, others = values[pair], draws.sample(KEYS, 4), values[50 + 2 * pair : 52 + 2 * pair]
        names = [f"{key} {shared}" for key in keys[:2]]
        for number in range(2):
            lines = [(keys[number], shared), (keys[2 + number], others[number])]
            if draws.below(2):
                lines.reverse()
            builder.offer(2 * pair + number, Item(names[number], "", image=_page(draws, lines)))
            asked.append((names[number], {names[number]: 2, names[1 - number]: 1}))
    for index, (content, grades) in enumerate(asked):
        builder.ask(index, Item(content, content), grades)


WRITERS: dict[str, Callable[[SplitBuilder, str, Draws], None]] = {
    "I-CLS": _inks_and_icons,
    "I-QA": _questions,
    "I-RET": _words_and_digits,
    "I-VG": _crops,
    "V-CLS": _moving_words,
    "V-QA": _video_questions,
    "V-RET": _videos,
    "V-MRET": _moments,
    "VisDoc": _pages,
}
"""Group -> function that draws its data set."""


def draw_mini(row: MMEBDataset, split: str, seed: int = 0) -> LoadedDataset:
    """Draw one data set.

    Args:
        row: One of `mini.MINI`.
        split: `train`, `validation` or `test`.
        seed: Seed of the drawing; the contents of a split stay in that split under every seed.

    Returns:
        mteb's data, media as PPM bytes in memory.

    Raises:
        ValueError: Unknown split.
    """
    if split not in scenes.SPLIT_RANGES:
        raise ValueError(f"split must be one of {list(scenes.SPLIT_RANGES)}, got {split!r}")
    builder = SplitBuilder(row)
    WRITERS[row.group](builder, split, Draws(seed, row.name, split))
    return builder.build()
