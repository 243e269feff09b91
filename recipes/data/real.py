"""Real pairs for training and comparing, made on the spot from Debian packages; none of them is committed.

    python -m recipes.data.real stamps --to real/stamps

writes `train.jsonl`, `validation.jsonl` and `test.jsonl` (the form of `recipes/data/user_data.py`), their pictures and
`samples.png`, and prints counts and examples. Near-duplicates, in text or picture, never stand on both sides of a
split: they form one group, of which one pair is kept, and it goes where the hash of its content says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from recipes.command_line import ArgumentDefaultsRawHelp, CommandParser, run
from recipes.data.debian import CORPORA, RealPair

SPLITS = ("train", "validation", "test")
SAME_PICTURE = 3  # differing bits, of 64, up to which two pictures count as one
DEFAULT_CACHE = Path.home() / ".cache" / "st_btok" / "debian"


def group_pairs(pairs: Sequence[RealPair]) -> np.ndarray:
    """(N,) group of every pair: pairs that share a text, nearly, or a picture, nearly, are in one.

    Texts are the same if their first twelve words are, without case, digits and punctuation. Pictures are the same if
    their difference hashes (8 x 8 signs of neighbouring brightnesses) differ in at most 3 of 64 bits.
    """
    keys: dict[str, list[int]] = {}
    hashes: list[tuple[int, int]] = []
    for number, pair in enumerate(pairs):
        for side in (pair.query, pair.positive):
            if isinstance(side, str):
                # Word characters of every script: without them a text of digits would equal every other.
                words = re.findall(r"[^\W\d_]+", side.lower())[:12]
                keys.setdefault(" ".join(words) or side, []).append(number)
            else:
                hashes.append((number, difference_hash(side)))
    edges = [(members[0], other) for members in keys.values() for other in members[1:]]
    edges += _near_pictures(hashes)
    if not edges:
        return np.arange(len(pairs))
    left, right = np.array(edges).T
    graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(len(pairs), len(pairs)))
    return connected_components(graph, directed=False)[1]


def difference_hash(picture: Image.Image) -> int:
    """64 bits: in each row of the picture at 9 x 8 pixels, whether it gets brighter from one pixel to the next."""
    small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BILINEAR), np.int16)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int(np.packbits(bits).view(">u8")[0])


def _near_pictures(hashes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs whose pictures are nearly the same; all against all, a row at a time."""
    if not hashes:
        return []
    numbers = np.array([number for number, _ in hashes])
    bits = np.array([value for _, value in hashes], np.uint64)
    found = []
    for row in range(len(bits)):
        near = np.bitwise_count(bits[row + 1 :] ^ bits[row]) <= SAME_PICTURE
        found += [(int(numbers[row]), int(other)) for other in numbers[row + 1 :][near]]
    return found


def split_pairs(pairs: Sequence[RealPair]) -> dict[str, list[int]]:
    """Row numbers of each split: of every 10 groups about 7 train, 1 validation, 2 test; one pair per group.

    One pair of a group, its first, is kept: of two that are nearly the same neither would be the only right answer.
    """
    chosen: dict[str, list[int]] = {name: [] for name in SPLITS}
    seen: set[int] = set()
    for number, group in enumerate(group_pairs(pairs)):
        if group in seen:
            continue
        seen.add(int(group))
        bucket = int(_content(pairs[number])[:8], 16) % 10
        chosen[SPLITS[0] if bucket < 7 else SPLITS[1] if bucket < 8 else SPLITS[2]].append(number)
    return chosen


def _content(pair: RealPair) -> str:
    digest = hashlib.sha256()
    for side in (pair.query, pair.positive):
        digest.update(side.encode() if isinstance(side, str) else side.tobytes())
    return digest.hexdigest()


def write_corpus(name: str, to: Path, cache: Path, limit: int | None = None) -> dict[str, int]:
    """Write a corpus of `CORPORA` to a folder; at most `limit` pairs are read, spread over the corpus.

    Returns:
        Number of pairs of each split, and under `"dropped"` of those that were nearly the same as another.
    """
    pairs = list(tqdm(CORPORA[name](cache), desc=name, unit="pair"))
    if limit is not None and len(pairs) > limit:
        pairs = [pairs[int(number)] for number in np.linspace(0, len(pairs) - 1, limit)]
    (to / "pictures").mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    for split, numbers in split_pairs(pairs).items():
        with (to / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in numbers:
                file.write(json.dumps(_record(pairs[number], number, to), ensure_ascii=False) + "\n")
        counts[split] = len(numbers)
        if split == "train":
            draw_samples([pairs[number] for number in numbers[:: max(len(numbers) // 12, 1)][:12]], to / "samples.png")
    counts["dropped"] = len(pairs) - sum(counts.values())
    return dict(counts)


def _record(pair: RealPair, number: int, to: Path) -> dict[str, str]:
    record = {}
    for side in ("query", "positive"):
        value = getattr(pair, side)
        if isinstance(value, str):
            record[f"{side}_text"] = value
        else:
            record[f"{side}_image"] = f"pictures/{number:06}.png"
            value.save(to / record[f"{side}_image"])
    return record


def draw_samples(pairs: Sequence[RealPair], path: Path) -> None:
    """A sheet of pairs, the query above its positive."""
    figure, axes = plt.subplots(4, 6, figsize=(15, 11), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for number, pair in enumerate(pairs):
        row, column = 2 * (number // 6), number % 6
        for offset, side in enumerate((pair.query, pair.positive)):
            axis = axes[row + offset, column]
            if isinstance(side, str):
                axis.text(
                    0, 1, side[:160], va="top", wrap=True, fontsize=8, transform=axis.transAxes, parse_math=False
                )
            else:
                axis.imshow(side)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write_and_show(options: argparse.Namespace) -> None:
    """Write a corpus and say what is in it."""
    counts = write_corpus(options.corpus, options.to, options.cache, options.limit)
    print(", ".join(f"{number} {name}" for name, number in counts.items()))
    for line in (options.to / "train.jsonl").read_text(encoding="utf-8").splitlines()[:3]:
        print(line[:200])


def main() -> None:
    """Write the corpus that the command line names."""
    parser = CommandParser(
        prog="python -m recipes.data.real", description=__doc__, formatter_class=ArgumentDefaultsRawHelp
    )
    parser.add_argument("corpus", choices=list(CORPORA))
    parser.add_argument("--to", "--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="unpacked packages")
    parser.add_argument("--limit", type=int, help="at most so many pairs, spread over the corpus")
    options = parser.parse_args()
    run(lambda: write_and_show(options))


if __name__ == "__main__":
    main()
