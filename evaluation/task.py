"""MMEB-V2 as mteb tasks: one class for all 78 rows, and the benchmark made of them.

    benchmark = mmeb_v2_benchmark("data/MMEB-V2", subset=["I-VG", "MSVD"], fraction=0.1)
    mteb.evaluate(stamp(model), benchmark, cache=mteb.ResultCache("results"))

Results are stored per data set, fraction, data and checkpoint: the task's name holds the split, the fraction, how
inputs are shown and, once it is loaded, a hash of its data; the model's revision is a fingerprint of all its files (a
model that comes without one gets it before its first task runs). A killed run continues with the first data set that
has no result, and data that changed never meet an old one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mteb import Benchmark
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import MultiVectorWrapper, SentenceTransformerEncoderWrapper
from mteb.types import Modalities, PromptType

from evaluation.chance import chance_level
from evaluation.dataset import InputSettings, PageSplit, Protocol
from evaluation.embedding.encoding import media_first, own_prompt
from evaluation.embedding.fingerprint import checkpoint
from evaluation.embedding.store import EmbeddingStore
from evaluation.mmeb_v2 import MMEB_V2, MMEBDataset
from evaluation.mmeb_v2.image import load_image
from evaluation.mmeb_v2.protocols import with_protocol
from evaluation.mmeb_v2.rows import select_rows
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.mmeb_v2.video import load_video
from evaluation.mmeb_v2.visdoc import load_visdoc, with_page_split
from evaluation.mmeb_v2.visdoc_rows import BROKEN_PAGE_HUB_IDS
from evaluation.pool import BrokenRow, LoadedDataset
from evaluation.ranking_metrics import leaderboard_metrics, official_ndcg

_LOADERS = {"image": load_image, "video": load_video, "visdoc": load_visdoc}
_METRICS = {"hit@1": ("hit_rate_at_1", "success_1"), "ndcg_linear@5": ("ndcg_at_5", "ndcg_cut_5")}
DATA_MARK = ".data-"
"""Stands in a task's name before the hash of its data."""
_REFERENCE = "https://huggingface.co/datasets/TIGER-Lab/MMEB-V2"


class MixedQueryMetadata(TaskMetadata):
    """Metadata of a task whose queries come with an image, a video or neither; mteb has no category for that."""

    def get_modalities(self, prompt_type: PromptType | None = None) -> list[Modalities]:
        """Modalities of the whole task, of its queries or of its documents."""
        if prompt_type == PromptType.query:
            return ["text", "image", "video"]
        return super().get_modalities(prompt_type)


def category_of(row: MMEBDataset) -> str:
    """The mteb category of a row, such as `it2t`: media and text of queries, then of candidates."""
    asked = {"visdoc": "", "image": "i", "video": "v"}[row.modality]
    if row.family in ("image", "captions"):
        asked = ""
    answered = {"visdoc": "i", "image": "i", "video": "v"}[row.modality]
    if row.family not in ("image", "captioned", "captions", "clips", "moments", "beir"):
        answered = ""
    return f"{asked}t2{answered}t"


class LoadedBenchmark(Benchmark):
    """A benchmark whose tasks are loaded as they are asked for.

    Results are looked up by a task's name, which has the hash of the data once they are loaded: so an iteration, as
    `mteb.evaluate` does it, finds the results that belong to today's data.
    """

    def __iter__(self) -> Iterator[Any]:
        """Its tasks, each loaded while it is at work."""
        for task in self.tasks:
            was_loaded = task.data_loaded
            task.load_data()
            try:
                yield task
            finally:
                if task.data_loaded and not was_loaded:
                    task.unload_data()


def task_name(row: MMEBDataset, page_split: PageSplit, fraction: float, seed: int) -> str:
    """The name results are stored under; two different measurements never share one."""
    # the protocol stands in every name, also the default's: a name without one would say nothing about whose rules
    page = "-fixed" if row.name in BROKEN_PAGE_HUB_IDS and page_split == "page-fixed" else ""
    part = "" if fraction == 1 else f".fraction{fraction:g}-seed{seed}"
    pin = f".revision-{row.revision[:8]}" if row.revision else ""
    return f"MMEB-V2.{row.protocol}.{row.name}{page}{row.inputs.label}{part}{pin}"


def instructed_sides(row: MMEBDataset) -> tuple[PromptType, ...]:
    """The sides of an MMEB-V2 data set whose inputs bring an instruction, in place of the model's own prompt.

    Every query has one; candidates with media have one too, bare labels and options have none.
    """
    if row.inputs.model_prompts or row.inputs.instruction == "none":
        return ()
    if row.inputs.candidate_instruction or category_of(row).split("2")[1] != "t":
        return (PromptType.query, PromptType.document)
    return (PromptType.query,)


class MMEBRetrieval(AbsTaskRetrieval):
    """One data set of MMEB-V2, or of another suite whose data sets are described by such rows.

    Args:
        row: Which one.
        load: Reads the data when mteb asks for it.
        name: Name results are stored under.
        eval_split: `test`, or `validation` or `train` where the suite has them.
        split_label: Version of the data, printed with every score.
        protocol: Whose rules the score follows, printed with every score; empty for a suite that has one set of rules.
        fraction: Part of the queries that `load` returns, in (0, 1].
        sample_seed: Seed of that part.
        store: Where embeddings are kept; tasks that share one encode shared candidates once.
        instructed: The sides whose inputs bring an instruction of the task's own, in place of the model's prompt.
        **kwargs: Passed to mteb's `AbsTask` (its `seed`).
    """

    ignore_identical_ids = False
    k_values = (1, 5, 10)

    def __init__(
        self,
        row: MMEBDataset,
        load: Callable[[], LoadedDataset],
        *,
        name: str,
        eval_split: str = "test",
        split_label: str = "page-fixed",
        protocol: str = "",
        fraction: float = 1.0,
        sample_seed: int = 0,
        store: EmbeddingStore | None = None,
        instructed: Collection[PromptType] = (),
        **kwargs: Any,
    ) -> None:
        self.row, self.eval_split, self.split_label = row, eval_split, split_label
        self.protocol, self.fraction, self.sample_seed = protocol, fraction, sample_seed
        self.store = EmbeddingStore() if store is None else store  # an empty store is falsy
        self.broken: tuple[BrokenRow, ...] = ()
        self.skipped_queries = 0
        self.versions: Mapping[str, str] = {}
        self.oddities: Mapping[str, int] = {}
        self.digest = ""
        self.instructions: Mapping[str, str] = {}
        self.prompts: dict[str, dict[str, str]] = {}
        self.instructed = frozenset(instructed)
        self._load = load
        self._own_metadata = _metadata(row, name, eval_split)
        super().__init__(**kwargs)

    @property
    def metadata(self) -> TaskMetadata:  # type: ignore[override]
        """Description of this task; its name ends in the hash of the data once they are loaded.

        A property, because mteb drops the instance attribute when it unloads data.
        """
        if not self.digest:
            return self._own_metadata
        name = f"{self._own_metadata.name}{DATA_MARK}{self.digest[:10]}"
        return self._own_metadata.model_copy(update={"name": name})

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read annotations and check the media; broken rows are logged, counted and left out."""
        if self.data_loaded:
            return
        loaded = self._load()
        self.dataset = {"default": {self.eval_split: loaded.data}}
        self.broken, self.skipped_queries = loaded.broken, loaded.skipped_queries
        self.versions, self.oddities = loaded.versions, loaded.oddities
        self.digest, self.instructions = loaded.digest, loaded.instructions
        self.data_loaded = True

    def evaluate(self, model: Any, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Evaluate as mteb does, after making sure that the result is stored under the model's fingerprint."""
        if isinstance(model, SentenceTransformerEncoderWrapper | MultiVectorWrapper):
            # in place and past pydantic's setter: mteb stores the result under the very object it already holds
            meta = model.mteb_model_meta
            vars(meta)["revision"] = checkpoint(model.model, meta.experiment_kwargs)
            self.load_data()
            self.prompts = self.prompts_of(model)
            model = media_first(model, self.store, self.instructed)
        return super().evaluate(model, *args, **kwargs)

    def prompts_of(self, wrapper: SentenceTransformerEncoderWrapper | MultiVectorWrapper) -> dict[str, dict[str, str]]:
        """What a model is told on either side.

        Args:
            wrapper: mteb's wrapper of the model.

        Returns:
            `query` and `document` -> the `model`'s own prompt, the `task`'s instruction (of the first row that has
            one), and whose is `shown`: `model`, `task`, `both` or `none`.
        """
        found = {}
        for side in (PromptType.query, PromptType.document):
            own = own_prompt(wrapper, self.metadata, side) or ""
            task = "" if self.row.inputs.instruction == "none" else self.instructions.get(side.value, "")
            if side == PromptType.document:
                task = self.row.inputs.candidate_instruction or task
            kept = own and side not in self.instructed
            whose = ("both" if task else "model") if kept else "task" if task else "none"
            found[side.value] = {"model": own, "task": task, "shown": whose}
        return found

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, Any]:
        """What a report needs beside mteb's means: every query's score, its uncertainty, and what was measured."""
        values = {query_id: entry[_METRICS[self.row.metric][1]] for query_id, entry in scores.items()}
        asked = len(values) + self.skipped_queries
        official = official_ndcg(qrels, results)
        return {
            "mmeb_name": self.row.name,
            "metric": self.row.metric,
            "group": self.row.group,
            "modality": self.row.modality,
            "split_label": self.split_label,
            "protocol": self.protocol,
            "oddities": dict(self.oddities),
            "data_versions": dict(self.versions),
            "data_digest": self.digest,
            "inputs": self.row.inputs.label,
            "prompts": self.prompts,
            "fraction": self.fraction,
            "sample_seed": self.sample_seed,
            "num_queries": len(values),
            "expected_queries": self.row.num_queries if self.fraction == 1 else asked,
            "skipped_queries": self.skipped_queries,
            "broken_rows": len(self.broken),
            "chance": chance_level(self.dataset[hf_subset][hf_split], self.row.metric),
            "standard_error": standard_error(list(values.values()), len(values) / self.fraction),
            "per_query": {query_id: round(value, 6) for query_id, value in values.items()},
            **leaderboard_metrics(qrels, results),
            **({} if official is None else {"ndcg_official": official}),
        }


def standard_error(values: Sequence[float], population: float) -> float:
    """Standard error of a mean over queries.

    Args:
        values: Score of each asked query.
        population: Number of queries of the complete data set. A complete run is still a sample of possible queries,
            so the finite-population factor is applied only to a part of the queries.

    Returns:
        s / sqrt(n), times sqrt(1 - n / population) for a part; 0 for fewer than two queries.
    """
    count = len(values)
    if count < 2:
        return 0.0
    factor = math.sqrt(1 - count / population) if round(population) > count else 1.0
    return float(np.std(values, ddof=1) / math.sqrt(count) * factor)


def _metadata(row: MMEBDataset, name: str, eval_split: str) -> TaskMetadata:
    mixed = row.family == "moments"
    category = category_of(row)
    codes = {"t": "text", "i": "image", "v": "video"}
    used = {"text", *(codes[letter] for letter in category.replace("2", "")), *(("image",) if mixed else ())}
    return (MixedQueryMetadata if mixed else TaskMetadata)(
        name=name,
        dataset={"path": row.hub_id, "revision": row.revision or row.split},
        description=f"{row.name}, group {row.group}, {row.candidates} candidates, {row.metric}.",
        reference=_REFERENCE,
        type="Any2AnyRetrieval",
        category=category,  # type: ignore[arg-type]
        modalities=sorted(used),
        eval_splits=[eval_split],
        eval_langs=["eng-Latn"],
        main_score=_METRICS[row.metric][0],
    )


def mmeb_task(
    row: MMEBDataset,
    root: str | Path | DataRoot,
    *,
    protocol: Protocol = "vlm2vec",
    page_split: PageSplit = "page-fixed",
    fraction: float = 1.0,
    seed: int = 0,
    inputs: InputSettings | None = None,
    store: EmbeddingStore | None = None,
) -> MMEBRetrieval:
    """The task of one MMEB-V2 row.

    Args:
        row: Which one.
        root: Folder with the data (see `sources`), or a `DataRoot`.
        protocol: `vlm2vec` (the benchmark's harness, default) or `btoks` (the paper's release); see `protocols`.
        page_split: `page-fixed` (the leaderboard's) or `page`; see `visdoc.with_page_split`.
        fraction: Part of the queries to ask, in (0, 1]; default all.
        seed: Seed of that choice, default 0.
        inputs: How inputs are shown, default as the harness shows them.
        store: Where embeddings are kept, default its own.

    Returns:
        The task; it reads nothing yet.

    Raises:
        ValueError: `fraction` outside (0, 1], unknown `page_split` or `protocol`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}: pass 1 for the complete data set")
    chosen = replace(with_protocol(with_page_split(row, page_split), protocol), inputs=inputs or InputSettings())
    place = root if isinstance(root, DataRoot) else DataRoot(Path(root))
    return MMEBRetrieval(
        chosen,
        partial(_load, chosen, place, fraction, seed),
        name=task_name(chosen, page_split, fraction, seed),
        split_label=page_split,
        protocol=protocol,
        fraction=fraction,
        sample_seed=seed,
        store=store,
        instructed=instructed_sides(chosen),
    )


def _load(row: MMEBDataset, root: DataRoot, fraction: float, seed: int) -> LoadedDataset:
    """The data, with the versions of the tables that this data set read."""
    own = replace(root, read={})
    loaded = _LOADERS[row.modality](row, own, fraction, seed)
    return replace(loaded, versions=own.read)


def mmeb_v2_benchmark(
    root: str | Path | DataRoot,
    *,
    subset: Sequence[str] | None = None,
    protocol: Protocol = "vlm2vec",
    fraction: float = 1.0,
    seed: int = 0,
    page_split: PageSplit = "page-fixed",
    revisions: Mapping[str, str] | None = None,
    inputs: InputSettings | None = None,
    store: EmbeddingStore | None = None,
) -> Benchmark:
    """MMEB-V2, or a part of it, as an mteb benchmark.

    Args:
        root: Folder with the data, or a `DataRoot`.
        subset: See `select_rows`; default all 78 data sets.
        protocol: `vlm2vec`, the benchmark's own harness (default), or `btoks`, the paper's release.
        fraction: Part of the queries of each data set, in (0, 1].
        seed: Seed of that choice.
        page_split: Which version of the two `-page` data sets.
        revisions: Data set -> hub commit of its annotations to pin; other data are then refused. Default: what is
            there; every result records which commit (or which files) that was.
        inputs: How inputs are shown: frames, the place of instructions, the model's own prompts. Default: as the
            harness shows them.
        store: Where embeddings are kept; with a folder, a killed run continues within a data set. Default: memory.

    Returns:
        The benchmark; its name holds the protocol and the split, and the part if it is one.

    Raises:
        ValueError: A revision for a data set that is not asked for.
    """
    store = EmbeddingStore() if store is None else store
    pinned = dict(revisions or {})
    rows = [replace(row, revision=pinned.pop(row.name, row.revision)) for row in select_rows(subset)]
    if pinned:
        raise ValueError(f"revisions name {sorted(pinned)}, which are not among the {len(rows)} data sets asked for")
    options: dict[str, Any] = {
        "page_split": page_split,
        "fraction": fraction,
        "seed": seed,
        "store": store,
        "inputs": inputs,
    }
    tasks = [mmeb_task(row, root, protocol=protocol, **options) for row in rows]
    if fraction != 1:
        warnings.warn(f"fraction={fraction:g} of the queries (seed {seed}): an estimate, not a score", stacklevel=2)
    part = "" if len(rows) == len(MMEB_V2) and fraction == 1 else f", {len(rows)} of 78, fraction {fraction:g}"
    label = inputs.label.replace(".", ", ") if inputs else ""
    return LoadedBenchmark(
        name=f"MMEB-V2({protocol}, {page_split}{label}{part})",
        tasks=tasks,
        description="Image, video and visual-document retrieval; plain mean over data sets.",
        reference=_REFERENCE,
        citation=None,
    )
