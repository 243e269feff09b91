"""From queries and candidates to mteb's `RetrievalSplitData`: one pool, duplicates collapsed, broken rows reported.

A candidate is known by its identity key: the first one with a key enters the pool and is encoded once, later ones
are the same candidate. Document ids are hashes of the keys and candidate lists are sorted by id: upstream the positive
stands first in its own list, so any rule for equal scores that prefers early positions would inflate hit@1.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from evaluation.dataset import MMEBDataset
from evaluation.media import BrokenMediaError, check_image, with_videos

if TYPE_CHECKING:  # comparisons read rows with this module too, and mteb takes seconds to import
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """A query or a candidate.

    Args:
        key: Identity; candidates with the same key are one candidate.
        text: Text, empty for media alone.
        image: Path or encoded bytes of an image.
        video: Paths or encoded bytes of the frames to show, in order.
    """

    key: str
    text: str
    image: str | bytes | None = None
    video: tuple[str | bytes, ...] = ()

    @property
    def blank(self) -> bool:
        """Whether there is nothing to see and nothing to read."""
        return not self.text.strip() and self.image is None and not self.video

    def check(self) -> None:
        """Raise `BrokenMediaError` when a file can't be decoded."""
        for path in (*self.video, *((self.image,) if self.image else ())):
            check_image(path)


@dataclass(frozen=True)
class BrokenRow:
    """A row, or one candidate of it, that was left out: data set, row index in the annotation table, reason."""

    dataset: str
    index: int
    reason: str


@dataclass(frozen=True)
class LoadedDataset:
    """What a loader returns: mteb's data, what had to be left out of it, and which version of the data it is.

    `versions` maps hub ids to commits, or to hashes of local files; empty for generated data. `oddities` counts rows
    that are kept although they are odd, because the benchmark's harness keeps them: what -> number.
    """

    data: RetrievalSplitData
    broken: tuple[BrokenRow, ...]
    skipped_queries: int
    versions: Mapping[str, str] = field(default_factory=dict)
    oddities: Mapping[str, int] = field(default_factory=dict)


def document_id(key: str) -> str:
    """The id of a candidate: a hash of its identity key, so ties are broken without favour."""
    return hashlib.blake2b(key.encode(), digest_size=10).hexdigest()


def sampled_rows(num_rows: int, fraction: float, seed: int) -> list[int]:
    """A fixed random part of the rows, in order.

    Args:
        num_rows: Number of rows there are.
        fraction: Part to keep, in (0, 1]; at least one row is kept.
        seed: Seed of the choice; the same seed and size give the same rows on any machine.

    Returns:
        Sorted row indices.

    Raises:
        ValueError: `fraction` outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}: pass 1 for the complete data set")
    if fraction == 1:
        return list(range(num_rows))
    size = max(1, round(num_rows * fraction))
    return sorted(np.random.default_rng(seed).choice(num_rows, size, replace=False).tolist())


class SplitBuilder:
    """Collects the queries and candidates of one data set.

    Args:
        row: The data set; its name goes into every report.
    """

    def __init__(self, row: MMEBDataset) -> None:
        self._row = row
        self._pool: dict[str, Item] = {}
        self._refused: set[str] = set()
        self._queries: list[tuple[str, Item]] = []
        self._relevant: dict[str, dict[str, int]] = {}
        self._lists: dict[str, list[str]] = {}
        self._broken: list[BrokenRow] = []
        self._skipped = 0
        self._odd: Counter[str] = Counter()

    def remark(self, what: str) -> None:
        """Count something odd that stays in, because the benchmark's harness keeps it too."""
        self._odd[what] += 1

    def report(self, index: int, reason: str) -> None:
        """Record and log something that is left out of row `index`."""
        self._broken.append(BrokenRow(self._row.name, index, reason))
        logger.warning("%s, row %d: %s", self._row.name, index, reason)

    def skip(self, index: int, reason: str) -> None:
        """Leave out the query of row `index`."""
        self._skipped += 1
        self.report(index, f"query skipped: {reason}")

    def offer(self, index: int, item: Item) -> bool:
        """Put a candidate into the pool.

        Args:
            index: Row that brings it, for the report.
            item: The candidate.

        Returns:
            Whether the pool holds it; a broken one is reported once and stays out.
        """
        if item.key in self._pool:
            return True
        if item.key in self._refused:
            return False
        try:
            item.check()
            if item.blank:  # the harness ranks an empty text like any other
                self.remark("blank candidates")
        except BrokenMediaError as error:
            self._refused.add(item.key)
            self.report(index, f"candidate {item.key!r} left out: {error}")
            return False
        self._pool[item.key] = item
        return True

    def ask(
        self,
        index: int,
        item: Item,
        gold: Mapping[str, int],
        own: Iterable[Item] | None = None,
        *,
        answerable: bool = True,
    ) -> None:
        """Add the query of row `index`.

        Args:
            index: Row index; it becomes the query id.
            item: The query.
            gold: Identity keys of the right candidates -> grade (>= 1).
            own: The query's own candidates; `None` where it ranks the whole pool.
            answerable: Whether a right candidate must be among those it ranks. If not, the query counts as missed.
        """
        try:
            if item.blank:
                raise BrokenMediaError("empty text and no media")
            item.check()
        except BrokenMediaError as error:
            self.skip(index, str(error))
            return
        listed = None if own is None else {c.key for c in own if self.offer(index, c)}
        reachable = self._pool.keys() if listed is None else listed
        usable = gold if not answerable else {key: grade for key, grade in gold.items() if key in reachable}
        relevant = {document_id(key): grade for key, grade in usable.items()}
        if not relevant:
            self.skip(index, f"none of its {len(gold)} right candidates can be used")
            return
        query_id = f"q{index}"
        self._queries.append((query_id, item))
        self._relevant[query_id] = relevant
        if listed is not None:
            self._lists[query_id] = sorted(map(document_id, listed))

    def build(self) -> LoadedDataset:
        """Everything collected so far.

        Returns:
            The data set and its broken rows.

        Raises:
            ValueError: Not one usable query is left.
        """
        if not self._queries:
            reasons = "; ".join(f"row {row.index}: {row.reason}" for row in self._broken[:3])
            raise ValueError(
                f"{self._row.name} has no usable query ({len(self._broken)} broken rows: {reasons or 'empty table'}). "
                f"Check the media below one of {self._row.media_roots}."
            )
        from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

        data = RetrievalSplitData(
            corpus=to_dataset([(document_id(key), item) for key, item in self._pool.items()]),
            queries=to_dataset(self._queries),
            relevant_docs=self._relevant,
            top_ranked=self._lists or None,
        )
        return LoadedDataset(data, tuple(self._broken), self._skipped, oddities=dict(self._odd))


def to_dataset(items: list[tuple[str, Item]]) -> Dataset:
    """Rows of (id, item) as a data set with columns `id`, `image`, `video`, `text`; media columns only where used.

    Media columns stand before the text, the order in which the official evaluator shows them.
    """
    columns: dict[str, list] = {"id": [item_id for item_id, _ in items]}
    features = {"id": Value("string"), "text": Value("string")}
    if any(item.image for _, item in items):
        columns["image"], features["image"] = [_stored(item.image) for _, item in items], Image()
    if any(item.video for _, item in items):
        columns["video"] = [list(item.video) or None for _, item in items]
        in_memory = any(isinstance(frame, bytes) for _, item in items for frame in item.video)
        features["video"] = List(Value("binary" if in_memory else "string"))
    columns["text"] = [item.text for _, item in items]
    return with_videos(Dataset.from_dict(columns, features=Features({name: features[name] for name in columns})))


def _stored(image: str | bytes | None) -> dict[str, str | bytes | None] | None:
    """An image as its column stores it; a column may mix paths and bytes (crops that had to be enlarged)."""
    if not image:
        return None
    return {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}
