"""The mini benchmark: MMEB-V2's nine meta-tasks in small, drawn on the spot, for two cores and no network.

    mteb.evaluate(stamp(model), mini_benchmark(), cache=mteb.ResultCache("results"))

| data set | asked | ranked | chance |
|---|---|---|---|
| mini-I-CLS | picture of a word, or of an icon | 8 inks, or 36 icon names, own list | 0.076 |
| mini-I-QA | page or icon grid, with a question | 10 answers, own list | 1/10 |
| mini-I-RET | "ink word", or a handwritten digit | 50 words, 50 digits | 1/100 |
| mini-I-VG | page and a key | 8 pictures of words, own list | 1/8 |
| mini-V-CLS | video of a moving word | 8 inks | 1/8 |
| mini-V-QA | video of three words and an ink | 8 words, own list | 1/8 |
| mini-V-RET | "ink word, ink word" | 100 videos of two words, every pair in both orders | 1/100 |
| mini-V-MRET | video of four words and "ink word" | 8 clips, own list | 1/8 |
| mini-VisDoc | "key value" | 100 pages, graded (right key and value 2, value under another key 1) | 0.034 |

Every data set has 100 queries per split. Splits are by content: a word, a digit or a grid belongs to train,
validation or test by its own hash (`scenes.bucket`), so nothing seen in one split is drawn in another. The same
seed gives the same bytes on any machine. Metrics and aggregation are MMEB-V2's. Texts carry no instruction: models of
this size have never read one, and with MMEB-V2's wordings the quickstart model was at chance on six of nine; a model's
own prompts apply as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mteb import Benchmark

from evaluation.dataset import GROUPS, MMEBDataset
from evaluation.embedding.store import EmbeddingStore
from evaluation.evaluator import SuiteEvaluator
from evaluation.mini import scenes
from evaluation.mini.tasks import NUM_QUERIES, WRITERS, draw_mini
from evaluation.task import LoadedBenchmark, MMEBRetrieval

VERSION = "mini-1"


def _row(group: str, family: str, candidates: int | None) -> MMEBDataset:
    visdoc = group == "VisDoc"
    own_lists = group in ("I-CLS", "I-QA", "I-VG", "V-QA", "V-MRET")
    return MMEBDataset(
        name=f"mini-{group}",
        modality=GROUPS[group],
        group=group,
        family=family,
        hub_id=f"generated/{VERSION}",
        metric="ndcg_linear@5" if visdoc else "hit@1",
        candidates="local" if own_lists else "global",
        query_text="",
        candidate_text="",
        num_queries=NUM_QUERIES,
        num_candidates=candidates,
        graded=visdoc,
    )


MINI: tuple[MMEBDataset, ...] = (
    _row("I-CLS", "text", None),
    _row("I-QA", "text", 10),
    _row("I-RET", "captioned", 100),
    _row("I-VG", "captioned", 8),
    _row("V-CLS", "labels", 8),
    _row("V-QA", "label_lists", 8),
    _row("V-RET", "captions", 100),
    _row("V-MRET", "clips", 8),
    _row("VisDoc", "beir", 100),
)
"""The nine rows; the families give the shapes of queries and candidates, see `task.category_of`."""


def mini_benchmark(
    split: str = "test",
    seed: int = 0,
    groups: Sequence[str] | None = None,
    *,
    store: EmbeddingStore | None = None,
) -> Benchmark:
    """The mini benchmark as mteb tasks.

    Args:
        split: `test` (default), `validation` or `train`.
        seed: Seed of the drawing, default 0; results of other seeds are stored under other names.
        groups: Groups such as `I-QA`, data-set names or modalities; default all nine.
        store: Where embeddings are kept; with a folder, a killed run continues within a data set. Default: memory.

    Returns:
        The benchmark.

    Raises:
        ValueError: Unknown split or group.
    """
    if split not in scenes.SPLIT_RANGES:
        raise ValueError(f"split must be one of {list(scenes.SPLIT_RANGES)}, got {split!r}")
    known = {label for row in MINI for label in (row.group, row.name, row.modality)}
    if unknown := sorted(set(groups or ()) - known):
        raise ValueError(f"unknown group {unknown}: use {list(WRITERS)}, a data-set name or a modality")
    rows = [row for row in MINI if groups is None or {row.group, row.name, row.modality} & set(groups)]
    return LoadedBenchmark(
        name=f"{VERSION}({split})",
        tasks=_tasks(rows, split, seed, EmbeddingStore() if store is None else store),
        description="MMEB-V2's meta-tasks in small, offline.",
    )


def _tasks(rows: Sequence[MMEBDataset], split: str, seed: int, store: EmbeddingStore) -> list[MMEBRetrieval]:
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
    tasks = _tasks(MINI, split, seed, EmbeddingStore())
    return SuiteEvaluator(tasks, name=f"{VERSION}_{split}", batch_size=batch_size)
