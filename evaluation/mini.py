"""The mini benchmark: MMEB-V2's nine meta-tasks in small, drawn on the spot, for two cores and no network.

    mteb.evaluate(stamp(model), mini_benchmark(), cache=mteb.ResultCache("results"))

| data set | asked | ranked | chance |
|---|---|---|---|
| mini-I-CLS | picture of an icon | the 36 icon names | 1/36 |
| mini-I-QA | icon grid + question about a place | 10 answers, own list | 1/10 |
| mini-I-RET | "colour word" | 100 pictures of words | 1/100 |
| mini-I-VG | icon grid + place | 8 crops, own list | 1/8 |
| mini-V-CLS | video of an icon | 6 kinds of motion | 1/6 |
| mini-V-QA | video of four words + "which word comes ...?" | 8 words, own list | 1/8 |
| mini-V-RET | "icon, then icon, then icon" | 100 videos | 1/100 |
| mini-V-MRET | video of four scenes + description of one | 8 clips, own list | 1/8 |
| mini-VisDoc | "key value" | 100 pages, graded (right key and value 2, value under another key 1) | 0.034 |

Every data set has 100 queries per split. Splits are by content: a word, a grid or a motion belongs to train,
validation or test by its own hash (`mini_scenes.bucket`), so nothing seen in one split is drawn in another. The same
seed gives the same bytes. Metrics and aggregation are MMEB-V2's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from zlib import crc32

import numpy as np
from mteb import Benchmark

from evaluation import mini_scenes as scenes
from evaluation.encoding import EmbeddingStore
from evaluation.evaluator import SuiteEvaluator
from evaluation.mmeb_v2_row import GROUPS, MMEBDataset
from evaluation.pool import Item, LoadedDataset, SplitBuilder
from evaluation.task import MMEBRetrieval

NUM_QUERIES = 100
VERSION = "mini-1"
KEYS = "name city item code team boss road room tool file".split()
MOTIONS = "left right up down fades grows".split()
Rng = np.random.Generator
Grid = dict[tuple[int, int], tuple[str, str]]


def _row(group: str, family: str, query_text: str, candidate_text: str, candidates: int) -> MMEBDataset:
    visdoc = group == "VisDoc"
    return MMEBDataset(
        name=f"mini-{group}",
        modality=GROUPS[group],
        group=group,
        family=family,
        hub_id=f"generated/{VERSION}",
        metric="ndcg_linear@5" if visdoc else "hit@1",
        candidates="global" if visdoc or family in ("labels", "captions") else "local",
        query_text=query_text,
        candidate_text=candidate_text,
        num_queries=NUM_QUERIES,
        num_candidates=candidates,
        graded=visdoc,
    )


MINI: tuple[MMEBDataset, ...] = (
    _row("I-CLS", "text", "Identify the icon shown in the image", "{label}", len(scenes.ICONS)),
    _row("I-QA", "text", "Represent the given image with the following question: {body}", "{option}", 10),
    _row("I-RET", "image", "Find an image of this word: {body}", "Represent the given image", 100),
    _row("I-VG", "captioned", "Select the portion of the image that is {body}", "Represent the given crop", 8),
    _row("V-CLS", "labels", "Recognize the motion in the video", "{label}", len(MOTIONS)),
    _row("V-QA", "label_lists", "Answer the question about the video: {body}", "{option}", 8),
    _row("V-RET", "captions", "Find a video that shows: {body}", "Understand the content of the provided video", 100),
    _row("V-MRET", "clips", "Find the clip of the given video that shows {body}", "Understand the clip", 8),
    _row("VisDoc", "beir", "Find a document image that states: {body}", "Understand the document image", 100),
)
"""The nine rows; the families give the shapes of queries and candidates, see `task.category_of`."""


def _pick(rng: Rng, options: Sequence[str], count: int) -> list[str]:
    return [str(option) for option in rng.choice(list(options), count, replace=False)]


def _icons(rng: Rng, count: int) -> list[tuple[str, str]]:
    """(ink, icon) pairs: all icons different, inks at will."""
    names = _pick(rng, scenes.ICONS, count)
    return [(str(rng.choice(list(scenes.INKS))), name) for name in names]


def caption_of(grid: Grid) -> str:
    """The content of a grid, which decides its split: `red key top left, blue cat bottom right`."""
    return ", ".join(f"{ink} {name} {scenes.PLACES[place]}" for place, (ink, name) in sorted(grid.items()))


def _grid(rng: Rng, split: str, count: int) -> Grid:
    while True:
        places = sorted(tuple(map(int, divmod(int(p), 2))) for p in rng.permutation(4)[:count])
        grid: Grid = dict(zip(places, _icons(rng, count), strict=True))  # type: ignore[arg-type]
        if scenes.belongs(caption_of(grid), split):
            return grid


def _contents(rng: Rng, split: str, draw: Callable[[Rng], tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """`count` different contents of `split`."""
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        content = draw(rng)
        if scenes.belongs(" ".join(content), split):
            found[content] = None
    return list(found)


def _icon_classes(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    labels = [Item(name, name) for name in scenes.ICONS]

    def draw(rng: Rng) -> tuple[str, ...]:
        # steps of 14 pixels: a vision tower that has seen icons on a grid meets them on its own patch borders
        (ink, name), (top, left) = _icons(rng, 1)[0], 14 * rng.integers(3, size=2)
        return ink, name, str(top), str(left)

    for index, (ink, name, top, left) in enumerate(_contents(rng, split, draw, NUM_QUERIES)):
        image = scenes.icon_picture(ink, name, int(top), int(left))
        builder.ask(index, Item(f"{ink} {name} {top} {left}", row.query_text, image=image), {name: 1}, labels)


def _grid_questions(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    for index in range(NUM_QUERIES):
        grid = _grid(rng, split, 4)
        place = list(grid)[int(rng.integers(4))]
        ink, name = grid[place]
        answers = [f"{i} {n}" for i, n in (grid[place], *(cell for spot, cell in grid.items() if spot != place))]
        swaps = [f"{other} {name}" for other in _pick(rng, [i for i in scenes.INKS if i != ink], 3)]
        swaps += [f"{ink} {other}" for other in _pick(rng, [n for n in scenes.ICONS if n not in str(answers)], 3)]
        text = row.query_text.format(body=f"what is {scenes.PLACES[place]}?")
        query = Item(caption_of(grid), text, image=scenes.grid_picture(grid))
        builder.ask(index, query, {answers[0]: 1}, [Item(a, a) for a in (*answers, *swaps)])


def _word_pictures(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    chosen = _pick(rng, scenes.words(split), NUM_QUERIES)
    inks = [str(rng.choice(list(scenes.INKS))) for _ in chosen]
    pictures = [
        Item(word, row.candidate_text, image=scenes.word_picture(word, ink, int(rng.integers(9 - len(word)))))
        for word, ink in zip(chosen, inks, strict=True)
    ]
    for index, (word, ink) in enumerate(zip(chosen, inks, strict=True)):
        builder.ask(index, Item(word, row.query_text.format(body=f"{ink} {word}")), {word: 1}, pictures)


def _crops(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    for index in range(NUM_QUERIES):
        grid = _grid(rng, split, 4)
        place = list(grid)[int(rng.integers(4))]
        shown = set(grid.values())
        others = [cell for cell in _icons(rng, 12) if cell not in shown][:4]
        own = [Item(f"{i} {n}", row.candidate_text, image=scenes.icon_picture(i, n)) for i, n in (*shown, *others)]
        query = Item(
            caption_of(grid), row.query_text.format(body=scenes.PLACES[place]), image=scenes.grid_picture(grid)
        )
        builder.ask(index, query, {" ".join(grid[place]): 1}, sorted(own, key=lambda item: item.key))


def _motion(ink: str, name: str, motion: str, start: int) -> tuple[bytes, ...]:
    """Eight frames of one icon; it moves along 21 of the 28 free pixels, or fades, or grows from faint to full."""
    frames = []
    for step in range(8):
        way = 3 * step
        top = {"up": 28 - way, "down": way}.get(motion, start)
        left = {"left": 28 - way, "right": way}.get(motion, start)
        shade = {"fades": 1 - step / 8, "grows": (step + 1) / 8}.get(motion, 1.0)
        frames.append(scenes.icon_picture(ink, name, top, left, shade))
    return tuple(frames)


def _motions(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    def draw(rng: Rng) -> tuple[str, ...]:
        return (*_icons(rng, 1)[0], str(rng.choice(MOTIONS)), str(int(rng.integers(29))))

    for motion in MOTIONS:
        builder.offer(0, Item(motion, motion))
    for index, (ink, name, motion, start) in enumerate(_contents(rng, split, draw, NUM_QUERIES)):
        video = _motion(ink, name, motion, int(start))
        builder.ask(index, Item(f"{ink} {name} {motion} {start}", row.query_text, video=video), {motion: 1})


def _word_videos(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    for index in range(NUM_QUERIES):
        options = _pick(rng, scenes.words(split), 8)
        place = int(rng.integers(4))
        inks = [str(rng.choice(list(scenes.INKS))) for _ in range(4)]
        frames = [scenes.word_picture(word, ink) for word, ink in zip(options[:4], inks, strict=True)]
        text = row.query_text.format(body=f"which word comes {('first', 'second', 'third', 'last')[place]}?")
        query = Item(" ".join(options), text, video=tuple(itertools.chain(*zip(frames, frames, strict=True))))
        builder.ask(index, query, {options[place]: 1}, [Item(o, o) for o in sorted(options)])


def _icon_videos(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    def draw(rng: Rng) -> tuple[str, ...]:
        return tuple(" ".join(cell) for cell in _icons(rng, 4))

    contents = _contents(rng, split, draw, NUM_QUERIES)
    for index, content in enumerate(contents):
        cells = [cell.split() for cell in content]
        video = tuple(scenes.icon_picture(ink, name) for ink, name in cells for _ in range(2))
        builder.offer(index, Item(" ".join(content), row.candidate_text, video=video))
    for index, content in enumerate(contents):
        text = row.query_text.format(body=", then ".join(content))
        builder.ask(index, Item(" ".join(content), text), {" ".join(content): 1})


def _moments(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    for index in range(NUM_QUERIES):
        grids: dict[str, Grid] = {}
        while len(grids) < 8:
            grid = _grid(rng, split, 2)
            grids[caption_of(grid)] = grid
        captions, frames = list(grids), [scenes.grid_picture(grid) for grid in grids.values()]
        clips = [Item(c, row.candidate_text, video=(f, f)) for c, f in zip(captions, frames, strict=True)]
        place = int(rng.integers(4))
        video = tuple(itertools.chain(*zip(frames[:4], frames[:4], strict=True)))
        query = Item(" | ".join(captions[:4]), row.query_text.format(body=captions[place]), video=video)
        builder.ask(index, query, {captions[place]: 1}, clips)


def _pages(builder: SplitBuilder, row: MMEBDataset, split: str, rng: Rng) -> None:
    """100 pages in 50 pairs that share one value under different keys."""
    values = _pick(rng, scenes.words(split), 150)
    asked = []
    for pair in range(NUM_QUERIES // 2):
        shared, keys = values[pair], _pick(rng, KEYS, 4)
        others = values[50 + 2 * pair : 52 + 2 * pair]
        names = [f"{key} {shared}" for key in keys[:2]]
        for number in range(2):
            lines = [(keys[number], shared), (keys[2 + number], others[number])]
            if rng.random() < 0.5:
                lines.reverse()
            ink = str(rng.choice(list(scenes.INKS)))
            image = scenes.page_picture([(f"{k:<{scenes.WORD_CELLS}}{v}", 0) for k, v in lines], ink)
            builder.offer(2 * pair + number, Item(names[number], row.candidate_text, image=image))
            asked.append((names[number], {names[number]: 2, names[1 - number]: 1}))
    for index, (body, grades) in enumerate(asked):
        builder.ask(index, Item(body, row.query_text.format(body=body)), grades)


_WRITERS: dict[str, Callable[[SplitBuilder, MMEBDataset, str, Rng], None]] = {
    "I-CLS": _icon_classes,
    "I-QA": _grid_questions,
    "I-RET": _word_pictures,
    "I-VG": _crops,
    "V-CLS": _motions,
    "V-QA": _word_videos,
    "V-RET": _icon_videos,
    "V-MRET": _moments,
    "VisDoc": _pages,
}


def draw_mini(row: MMEBDataset, split: str, seed: int = 0) -> LoadedDataset:
    """Draw one data set.

    Args:
        row: One of `MINI`.
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
    rng = np.random.default_rng([seed, crc32(row.name.encode()), crc32(split.encode())])
    _WRITERS[row.group](builder, row, split, rng)
    return builder.build()


def mini_benchmark(split: str = "test", seed: int = 0, groups: Sequence[str] | None = None) -> Benchmark:
    """The mini benchmark as mteb tasks.

    Args:
        split: `test` (default), `validation` or `train`.
        seed: Seed of the drawing, default 0; results of other seeds are stored under other names.
        groups: Groups such as `I-QA`, or data-set names; default all nine.

    Returns:
        The benchmark.

    Raises:
        ValueError: Unknown split or group.
    """
    if split not in scenes.SPLIT_RANGES:
        raise ValueError(f"split must be one of {list(scenes.SPLIT_RANGES)}, got {split!r}")
    known = {label for row in MINI for label in (row.group, row.name, row.modality)}
    if unknown := sorted(set(groups or ()) - known):
        raise ValueError(f"unknown group {unknown}: use {list(_WRITERS)}, a data-set name or a modality")
    rows = [row for row in MINI if groups is None or {row.group, row.name, row.modality} & set(groups)]
    return Benchmark(
        name=f"{VERSION}({split})",
        tasks=_tasks(rows, split, seed),
        description="MMEB-V2's meta-tasks in small, offline.",
    )


def _tasks(rows: Sequence[MMEBDataset], split: str, seed: int) -> list[MMEBRetrieval]:
    store = EmbeddingStore()
    return [
        MMEBRetrieval(
            replace(row, split=split),
            partial(draw_mini, row, split, seed),
            name=f"{VERSION}.{row.group}.{split}" + (f".seed{seed}" if seed else ""),
            eval_split=split,
            split_label=f"{VERSION}/{split}",
            sample_seed=seed,
            store=store,
        )
        for row in rows
    ]


def evaluator_for(
    suite: str = "mini", split: str = "validation", *, seed: int = 0, batch_size: int = 32
) -> SuiteEvaluator:
    """An evaluator for the SentenceTransformerTrainer: model selection without touching a test split.

    Args:
        suite: `mini`. MMEB-V2 has test splits only, so it can't be used while training.
        split: `validation` (default) or `train`.
        seed: Seed of the drawing.
        batch_size: Inputs per forward pass, default 32.

    Returns:
        An evaluator whose primary metric is the plain mean over the nine data sets.

    Raises:
        ValueError: A test split, or a suite without any other.
    """
    if split == "test":
        raise ValueError(
            "a test split must not choose a model: use split='validation', and the test split once, at the end"
        )
    if suite != "mini":
        raise ValueError(f"suite {suite!r} has no {split} split: use suite='mini', or your own held-out data")
    if split not in scenes.SPLIT_RANGES:
        raise ValueError(f"split must be one of {list(scenes.SPLIT_RANGES)} except test, got {split!r}")
    return SuiteEvaluator(_tasks(MINI, split, seed), name=f"{VERSION}_{split}", batch_size=batch_size)
