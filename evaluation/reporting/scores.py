"""Results read back from mteb's result folders, their plain means, and how sure a difference is."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import mteb
import numpy as np

from evaluation.atomic_write import read_json
from evaluation.mmeb_v2 import GROUPS, MMEB_V2
from evaluation.result_cache import SAVING

logger = logging.getLogger(__name__)

OVERALL = "All"
MODALITIES = ("image", "video", "visdoc")
STOCK = "mteb"
"""Modality and split of mteb's own tasks, which are grouped by task type."""


@dataclass(frozen=True)
class Score:
    """A model's result on one data set.

    Args:
        dataset: Name on the leaderboard.
        modality: `image`, `video` or `visdoc`.
        group: Meta-task group.
        metric: `hit@1` or `ndcg_linear@5`.
        value: Mean over the queries, 0 to 1.
        split_label: Version of the data.
        num_queries: Queries scored.
        expected_queries: Queries there should be.
        standard_error: Of `value`, NaN where the result has no score per query (mteb's own tasks).
        fraction: Part of the queries that was asked for.
        chance: Score of a random ranking, NaN where unknown.
        protocol: Whose rules it follows: `vlm2vec` or `btoks`; empty for a suite with one set of rules.
        inputs: How inputs were shown, where not as the harness shows them: `.frames64.instruction-system`.
        data: Hash of the data; of a result that has none (older ones) a hash of what it tells of its data.
        per_query: Query id -> score; empty for published results.
        details: mteb's other scores.
    """

    dataset: str
    modality: str
    group: str
    metric: str
    value: float
    split_label: str
    num_queries: int = 0
    expected_queries: int = 0
    standard_error: float = 0.0
    fraction: float = 1.0
    chance: float = math.nan
    protocol: str = ""
    inputs: str = ""
    data: str = ""
    per_query: Mapping[str, float] = field(default_factory=dict, repr=False)
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def partial(self) -> bool:
        """Whether queries, candidates or pages are missing, or there are more queries than the data set has."""
        broken = self.details.get("broken_rows", 0)
        return bool(broken) or self.num_queries != self.expected_queries or self.fraction < 1


@dataclass(frozen=True)
class ModelScores:
    """All results of one checkpoint: name, revision, scores by data set, mteb's model metadata and versions.

    `older` names the data sets that it was also scored on with other data, before.
    """

    name: str
    revision: str
    scores: Mapping[str, Score]
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    versions: Mapping[str, str] = field(default_factory=dict, repr=False)
    older: tuple[str, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether only the first numbers of the embeddings were scored (`--truncate-dims`)."""
        return "truncate_dim" in (self.metadata.get("experiment_kwargs") or {})

    @property
    def size(self) -> int | None:
        """Numbers per embedding, where known."""
        return self.metadata.get("embed_dim")

    @property
    def protocol(self) -> str:
        """Whose rules the scores follow; `read_results` keeps two protocols of one checkpoint apart."""
        return next((score.protocol for score in self.scores.values()), "")

    @property
    def inputs(self) -> str:
        """How inputs were shown; `read_results` keeps two ways of one checkpoint apart."""
        return next((score.inputs for score in self.scores.values()), "")

    @property
    def split_label(self) -> str:
        """The version of the data; the scores of one model never mix two."""
        labels = sorted({score.split_label for score in self.scores.values()})
        if len(labels) != 1:
            raise ValueError(f"{self.name} mixes the splits {labels}: their averages differ by points; keep one")
        return labels[0]


@dataclass(frozen=True)
class Mean:
    """A plain mean over data sets.

    Args:
        value: The mean over the data sets that are there, NaN for none.
        standard_error: Of that mean, over queries.
        present: Number of data sets that are there.
        expected: Number of data sets there should be.
        partial: A data set misses queries or candidates: left out as broken, or only a fraction was asked.
    """

    value: float
    standard_error: float
    present: int
    expected: int
    partial: bool

    @property
    def complete(self) -> bool:
        """Whether the mean is over every query of every data set."""
        return self.present == self.expected and not self.partial

    def text(self) -> str:
        """`57.9`; an incomplete one says so: `61.2 (35 of 36)`, `~61.2` for a part of the queries, `-` for nothing."""
        if not self.present:
            return "-"
        shown = f"{'~' if self.partial else ''}{100 * self.value:.1f}"
        return shown if self.present == self.expected else f"{shown} ({self.present} of {self.expected})"


def expected_datasets() -> dict[str, tuple[str, str]]:
    """Name -> (modality, group) of the 78 data sets."""
    return {row.name: (row.modality, row.group) for row in MMEB_V2}


def summarize(scores: Mapping[str, Score], expected: Mapping[str, tuple[str, str]] | None = None) -> dict[str, Mean]:
    """Plain means over data sets: per group, per modality and over all.

    Args:
        scores: Data set -> score.
        expected: The data sets of the complete suite, name -> (modality, group); default MMEB-V2.

    Returns:
        `All`, the modalities and the groups -> mean, in this order. Every mean is over data sets, never over means.
    """
    expected = expected_datasets() if expected is None else expected
    means = {OVERALL: _mean(scores, list(expected))}
    for position, known in ((0, MODALITIES), (1, tuple(GROUPS))):
        # the leaderboard's order first; another suite (mteb's) brings modalities and groups of its own
        labels = dict.fromkeys([*known, *(place[position] for place in expected.values())])
        for label in labels:
            names = [name for name, place in expected.items() if place[position] == label]
            if names:
                means[label] = _mean(scores, names)
    return means


def _mean(scores: Mapping[str, Score], names: Sequence[str]) -> Mean:
    found = [scores[name] for name in names if name in scores]
    if not found:
        return Mean(math.nan, math.nan, 0, len(names), False)
    error = math.sqrt(sum(score.standard_error**2 for score in found)) / len(found)
    partial = any(score.partial for score in found)
    return Mean(fmean(score.value for score in found), error, len(found), len(names), partial)


@dataclass(frozen=True)
class Difference:
    """Paired bootstrap of two models: mean difference (second minus first), 95 % interval, number of data sets."""

    value: float
    low: float
    high: float
    datasets: int


def paired_bootstrap(
    first: Mapping[str, Score], second: Mapping[str, Score], *, samples: int = 2000, seed: int = 0
) -> Difference:
    """How sure the difference of two models' averages is, given the queries.

    Queries are redrawn within each data set, the same for both models; the statistic is the plain mean over the data
    sets that both have, and whose data were the same.

    Args:
        first: Scores of the model that is compared against.
        second: Scores of the other.
        samples: Number of redraws.
        seed: Seed of the redraws.

    Returns:
        Difference and interval, as fractions.

    Raises:
        ValueError: No data set with per-query scores of the same queries on the same data.
    """
    rng = np.random.default_rng(seed)
    means, redrawn = [], []
    for name in sorted(first.keys() & second.keys()):
        if second[name].data != first[name].data:
            continue
        ours, theirs = second[name].per_query, first[name].per_query
        common = sorted(ours.keys() & theirs.keys())
        if not common:
            continue
        gaps = np.array([ours[query] - theirs[query] for query in common])
        counts = rng.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), size=samples)
        means.append(gaps.mean())
        redrawn.append(counts @ gaps / len(gaps))
    if not means:
        raise ValueError(
            "no data set has per-query scores of both models on the same data: run both with evaluation.run on one "
            "copy of the data"
        )
    low, high = np.percentile(np.mean(redrawn, axis=0), [2.5, 97.5])
    return Difference(float(np.mean(means)), float(low), float(high), len(means))


def read_results(
    folders: Iterable[str | Path],
    *,
    used: Sequence[str] = (),
    parts: Mapping[str, Set[tuple[str, str]]] | None = None,
    wanted: Callable[[Score], bool] = lambda score: True,
) -> list[ModelScores]:
    """All checkpoints found below mteb result folders.

    Args:
        folders: Folders of `mteb.ResultCache`, or deeper ones down to `<model>/<revision>`.
        used: Hashes of the data that runs scored, in the order of the runs.
        parts: Task of mteb -> the splits and subsets (languages) that count; a result that lacks one is left out.
            Default: whatever a result holds.
        wanted: Whether a score is one of those to report.

    Returns:
        One entry per model, revision, truncation, protocol and way of showing inputs, sorted by name, whatever folder
        its results lie in. Results of mteb's own tasks count as well. Of results on several versions of a data set
        that one counts which a run scored last, else the newest.

    Raises:
        FileNotFoundError: Nothing found.
        ValueError: Two splits or fractions of the same data set of one checkpoint, or a result in a form that can't be
            read.
    """
    paths = sorted({path for folder in folders for path in Path(folder).rglob("*.json")})
    # predictions are large and no results; the other folders are those of a save that was cut short
    paths = [path for path in paths if not path.name.endswith("_predictions.json") and SAVING not in str(path)]
    found: dict[tuple[str, ...], dict[str, Score]] = {}
    older: dict[tuple[str, ...], list[str]] = {}
    places: dict[tuple[str, ...], Path] = {}
    order = {digest: number for number, digest in enumerate(used)}
    contents = [(path, read_json(path)) for path in paths]
    scored = [
        (order.get(score.data, -1), _date(path, content), path, score)
        for path, content in contents
        if _is_result(content)
        for score in _scores_of(path, content, parts)
        if wanted(score)
    ]
    for _, date, path, score in sorted(scored, key=lambda entry: entry[:3]):  # the one that counts comes last
        checkpoint = (*_identity(path.parent), score.protocol, score.inputs)
        known = found.setdefault(checkpoint, {}).get(score.dataset)
        if known is not None and sample_of(known) != sample_of(score):
            raise ValueError(f"{path.parent} holds {score.dataset} twice (splits or fractions): report one at a time")
        if known is not None and known.data != score.data:
            older.setdefault(checkpoint, []).append(score.dataset)
            logger.warning("%s: %s of %s counts, not that on other data", path.parent, score.dataset, date)
        found[checkpoint][score.dataset] = score
        places[checkpoint] = path.parent
    if not found:
        raise FileNotFoundError(f"no result below {[str(folder) for folder in folders]}")
    return [_model(places[key], scores, tuple(older.get(key, ()))) for key, scores in sorted(found.items())]


def _identity(folder: Path) -> tuple[str, str, str]:
    """Name, revision and variant of the checkpoint whose results lie in a folder."""
    metadata = read_json(folder / "model_meta.json") or {}
    name, revision = metadata.get("name") or folder.parent.name, metadata.get("revision") or folder.name
    variant = metadata.get("experiment_kwargs")
    return str(name), str(revision), json.dumps(variant, sort_keys=True) if variant else ""


def sample(dataset: str, split_label: str, fraction: float, seed: int | None) -> tuple[str, float, int | None]:
    """Which version and which part of a data set is asked; all of MMEB-V2's queries are the same for every seed."""
    return split_label, fraction, None if dataset in expected_datasets() and fraction == 1 else seed


def sample_of(score: Score) -> tuple[str, float, int | None]:
    """The `sample` that a score is of."""
    return sample(score.dataset, score.split_label, score.fraction, score.details.get("sample_seed"))


def _is_result(content: Any) -> bool:
    """Whether a file's content is a result; not of one that was torn, or that holds something else."""
    return isinstance(content, dict) and "scores" in content and "task_name" in content


def _date(path: Path, content: Mapping[str, Any]) -> str:
    """When a result was made, by its own word, else by its file's time."""
    return str(content.get("date") or datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat())


def _scores_of(
    path: Path, content: Mapping[str, Any], parts: Mapping[str, Set[tuple[str, str]]] | None
) -> list[Score]:
    """The scores in a result; a `ValueError` names a file in another form, and what to do."""
    try:
        entries = {
            (split, entry.get("hf_subset", "default")): entry
            for split, found in content["scores"].items()
            for entry in found
        }
        ours = [_score(entry) for entry in entries.values() if "mmeb_name" in entry]
        if ours or not entries:
            return ours
        asked = (parts or {}).get(content["task_name"], entries.keys())
        if not asked <= entries.keys():
            return []
        chosen = [entry for part, entry in entries.items() if part in asked]
        return [stock_score(content["task_name"], chosen, str(content.get("dataset_revision") or ""))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is a result in another form ({type(error).__name__}: {error}): delete it and score the data set "
            "again, or make this report with the version that wrote it"
        ) from error


def _score(entry: Mapping[str, Any]) -> Score:
    """A score of our own; what results of earlier versions lack has the value that it had then."""
    per_query = entry.get("per_query", {})
    count = entry.get("num_queries", len(per_query))
    return Score(
        dataset=entry["mmeb_name"],
        modality=entry["modality"],
        group=entry["group"],
        metric=entry["metric"],
        value=float(entry["main_score"]),
        split_label=entry["split_label"],
        protocol=entry.get("protocol", ""),
        inputs=entry.get("inputs", ""),
        data=entry.get("data_digest") or _told(entry),
        num_queries=count,
        expected_queries=entry.get("expected_queries", count),
        standard_error=entry.get("standard_error", math.nan),
        fraction=entry.get("fraction", 1.0),
        chance=entry.get("chance", math.nan),
        per_query=per_query,
        details=entry,
    )


def _told(entry: Mapping[str, Any]) -> str:
    """What a result without a hash of its data tells of them: versions, queries, and the chance level of its pool."""
    told = [entry.get("data_versions"), sorted(entry.get("per_query", {})), entry.get("chance")]
    return "before-" + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def stock_score(task_name: str, entries: Sequence[Mapping[str, Any]], revision: str = "") -> Score:
    """The score of one of mteb's own tasks.

    Args:
        task_name: The task.
        entries: Its entries: one for each split and subset (a language, say).
        revision: Version of its data.

    Returns:
        The plain mean of the entries' main scores, as mteb's `get_score`; modality `mteb`, group the task's type.
    """
    metadata = mteb.get_task(task_name).metadata
    value = fmean(entry["main_score"] for entry in entries)
    return Score(
        dataset=task_name,
        modality=STOCK,
        group=metadata.type,
        metric=metadata.main_score,
        value=float(value),
        split_label=STOCK,
        data=revision,
        standard_error=math.nan,
        details={"entries": len(entries)},
    )


def _model(folder: Path, scores: Mapping[str, Score], older: tuple[str, ...]) -> ModelScores:
    meta_file, settings = folder / "model_meta.json", folder / "run_settings.jsonl"
    metadata = read_json(meta_file) or {}
    lines = settings.read_text(encoding="utf-8").splitlines() if settings.is_file() else []
    versions = json.loads(lines[-1]).get("version", {}) if lines else {}
    name = metadata.get("name") or folder.parent.name.replace("__", "/")
    revision = metadata.get("revision") or folder.name
    return ModelScores(name, revision, scores, metadata, versions, older=tuple(dict.fromkeys(older)))
