"""From queries and candidates to mteb's `RetrievalSplitData`: one pool, duplicates collapsed, broken rows reported.

A candidate is known by its identity key: the first one with a key enters the pool and is encoded once, later ones
are the same candidate. Document ids are hashes of the keys and candidate lists are sorted by id: upstream the positive
stands first in its own list, so any rule for equal scores that prefers early positions would inflate hit@1.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from evaluation.dataset import InputSettings, MMEBDataset
from evaluation.embedding.store import content_key
from evaluation.media import PROMPT_COLUMN, BrokenMediaError, check_image, choose_frames, stored_frames, with_videos

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
        instruction: The task's instruction, which `text` begins with; empty for a text without one.
        body: The text without it (a text without instruction is its own body); `None` where nobody can tell the two
            apart.
    """

    key: str
    text: str
    image: str | bytes | None = None
    video: tuple[str | bytes, ...] = ()
    instruction: str = ""
    body: str | None = ""

    @property
    def blank(self) -> bool:
        """Whether there is nothing to see and nothing to read."""
        return not self.text.strip() and self.image is None and not self.video

    def check(self) -> None:
        """Raise `BrokenMediaError` when a file can't be decoded."""
        for path in (*self.video, *((self.image,) if self.image else ())):
            check_image(path)

    def content(self) -> bytes:
        """Hash of what stands behind the item, whatever part of it is shown: text, bytes of the media.

        Of a stored video these are the names and sizes of all its frames and the bytes of the eight that are shown by
        default: the same data have one hash for every number of frames.
        """
        frames = list(self.video)
        listing = []
        if frames and isinstance(frames[0], str):
            stored = stored_frames(Path(frames[0]).parent)
            listing = [f"{path.name} {path.stat().st_size}" for path in stored]
            frames = list(choose_frames(stored))
        media = [self.image] if self.image else []
        read = [part if isinstance(part, bytes) else Path(part).read_bytes() for part in [*media, *frames]]
        return content_key(self.text, str(len(media)), *listing, *map(content_key, read))


@dataclass(frozen=True)
class BrokenRow:
    """A row, or one candidate of it, that was left out: data set, row index in the annotation table, reason."""

    dataset: str
    index: int
    reason: str


@dataclass(frozen=True)
class LoadedDataset:
    """What a loader returns: mteb's data, what had to be left out of it, and which version of the data it is.

    `digest` is a hash of everything a score rests on (see `data_digest`). `versions` maps hub ids to commits, or to
    hashes of local files; empty for generated data. `oddities` counts rows that are kept although they are odd,
    because the benchmark's harness keeps them: what -> number. `instructions` has the task's instruction of the first
    `query` and the first `document`, empty where it has none.
    """

    data: RetrievalSplitData
    broken: tuple[BrokenRow, ...]
    skipped_queries: int
    digest: str
    versions: Mapping[str, str] = field(default_factory=dict)
    oddities: Mapping[str, int] = field(default_factory=dict)
    instructions: Mapping[str, str] = field(default_factory=dict)


def data_digest(
    queries: Mapping[str, bytes],
    corpus: Mapping[str, bytes],
    relevant: Mapping[str, Mapping[str, int]],
    lists: Mapping[str, Sequence[str]] | None,
) -> str:
    """Hash of a data set as it is scored: which queries, which candidates, what they show, and which are right.

    Args:
        queries: Id -> hash of its content.
        corpus: Id -> hash of its content.
        relevant: Query -> document -> grade.
        lists: Query -> its own candidates; `None` where every query ranks the whole corpus.

    Returns:
        16 hexadecimal digits, independent of the order of the rows.
    """
    digest = hashlib.blake2b(digest_size=8)
    for kind, entries in (("query", queries), ("candidate", corpus)):
        for name in sorted(entries):
            digest.update(content_key(kind, name, entries[name]))
    for query in sorted(relevant):
        grades = [f"{document} {grade}" for document, grade in sorted(relevant[query].items())]
        listed = sorted(lists[query]) if lists else []
        digest.update(content_key(query, str(len(grades)), *grades, *listed))
    return digest.hexdigest()


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
        self._ids: dict[str, str] = {}  # a thousand lists share one string for each candidate

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
        self._ids[item.key] = document_id(item.key)
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
        relevant = {self._ids.get(key) or document_id(key): grade for key, grade in usable.items()}
        if not relevant:
            self.skip(index, f"none of its {len(gold)} right candidates can be used")
            return
        query_id = f"q{index}"
        self._queries.append((query_id, item))
        self._relevant[query_id] = relevant
        if listed is not None:
            self._lists[query_id] = sorted(self._ids[key] for key in listed)

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

        corpus = [(self._ids[key], item) for key, item in self._pool.items()]
        settings = self._row.inputs
        data = RetrievalSplitData(
            corpus=to_dataset([(name, shown(item, settings, candidate=True)) for name, item in corpus]),
            queries=to_dataset([(name, shown(item, settings)) for name, item in self._queries]),
            relevant_docs=self._relevant,
            top_ranked=self._lists or None,
        )
        digest = data_digest(
            {name: item.content() for name, item in self._queries},
            {name: item.content() for name, item in corpus},
            self._relevant,
            self._lists or None,
        )
        own = {"query": self._queries, "document": corpus}
        told = {side: next((i.instruction for _, i in items if i.instruction), "") for side, items in own.items()}
        return LoadedDataset(
            data, tuple(self._broken), self._skipped, digest, oddities=dict(self._odd), instructions=told
        )


def shown(item: Item, settings: InputSettings, *, candidate: bool = False) -> Item:
    """The item as settings show it.

    Args:
        item: The item as the harness shows it.
        settings: How inputs are shown.
        candidate: Whether it is a candidate.

    Returns:
        The item; its `instruction` is what goes to the model as a prompt, empty where the text says all.

    Raises:
        ValueError: The instruction has to leave the text, and nobody can tell which part of the text it is.
    """
    own = settings.candidate_instruction if candidate else ""
    if settings.instruction == "user" and not own:
        return replace(item, instruction="")
    if item.body is None:
        raise ValueError(
            "this table's texts are ready (it has no columns qry_inst and tgt_inst), so the instruction can't be told "
            "from the rest: use ziyjiang/MMEB_Test_Instruct, or --instruction user without --candidate_instruction"
        )
    body = item.body if item.instruction else item.text
    if settings.instruction == "user":
        return replace(item, text=f"{own} {body}".rstrip(), instruction="")
    return replace(item, text=body, instruction=(own or item.instruction) if settings.instruction == "system" else "")


def to_dataset(items: list[tuple[str, Item]]) -> Dataset:
    """Rows of (id, item) as a data set with columns `id`, `image`, `video`, `text`; media columns only where used.

    Media columns stand before the text, the order in which the official evaluator shows them. A column `PROMPT_COLUMN`
    follows where an item has an instruction beside its text.
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
    if any(item.instruction for _, item in items):
        columns[PROMPT_COLUMN], features[PROMPT_COLUMN] = [i.instruction for _, i in items], Value("string")
    return with_videos(Dataset.from_dict(columns, features=Features({name: features[name] for name in columns})))


def _stored(image: str | bytes | None) -> dict[str, str | bytes | None] | None:
    """An image as its column stores it; a column may mix paths and bytes (crops that had to be enlarged)."""
    if not image:
        return None
    return {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}
