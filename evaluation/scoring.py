"""Scoring one model on one suite: what can be read and what can't, the scores, and the record of the run.

`evaluation.run` is its command line. A set that is missing or torn is found before the first encoding; the others are
scored, and whoever reads the report sees which are missing, and why.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mteb
import torch
from mteb import Benchmark
from mteb.models import MultiVectorWrapper, SentenceTransformerEncoderWrapper
from mteb.results import TaskResult
from mteb.types import PromptType
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from evaluation.atomic_write import atomic_write, read_json
from evaluation.baselines import load_model
from evaluation.embedding.store import EmbeddingStore
from evaluation.mini import MINI, mini_benchmark
from evaluation.mmeb_v2 import MMEB_V2
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.report import RUN_FILE, read_runs, write_report
from evaluation.reporting.retrieval_sheet import retrieval_sheet
from evaluation.reporting.scores import sample, sample_of
from evaluation.result_cache import WholeResultCache
from evaluation.run import MTEB_PREFIX, input_settings, stored_name
from evaluation.stock import stock_benchmark, stock_parts, stock_suite
from evaluation.task import DATA_MARK, MMEBRetrieval, mmeb_v2_benchmark
from evaluation.wrapping import wrap

logger = logging.getLogger(__name__)

_PACKAGES = ("mteb", "sentence-transformers", "transformers", "torch", "datasets", "open-clip-torch", "pillow")


def build_suite(options: argparse.Namespace) -> Benchmark:
    """The benchmark that `--suite` names.

    Args:
        options: Parsed command line.

    Returns:
        The benchmark; its data are not read yet.

    Raises:
        ValueError: Unknown suite, or MMEB-V2 without a data folder.
    """
    store = EmbeddingStore(Path(options.output_dir) / "embeddings", fresh=options.overwrite)
    if options.suite == "mini":
        return mini_benchmark(options.split, options.seed, options.subset, store=store)
    if options.suite == "mmeb-v2":
        if options.data is None or not Path(options.data).is_dir():
            raise ValueError(
                f"--suite mmeb-v2 needs --data, a folder with image-tasks, video-tasks or visdoc-tasks; got "
                f"{options.data!r}. Unpack the archives of huggingface.co/datasets/TIGER-Lab/MMEB-V2 there."
            )
        root = DataRoot(Path(options.data), offline=options.offline)
        return mmeb_v2_benchmark(
            root,
            subset=options.subset,
            protocol=options.protocol,
            fraction=options.fraction,
            seed=options.seed,
            page_split=options.page_split,
            revisions=dict(options.revision or ()),
            inputs=input_settings(options),
            store=store,
        )
    if options.suite.startswith(MTEB_PREFIX):
        return stock_benchmark(options.suite.removeprefix(MTEB_PREFIX), options.subset, options.data)
    raise ValueError(f"unknown suite {options.suite!r}: use mini, mmeb-v2 or mteb:<benchmark>")


def hardware() -> str:
    """Processors and GPUs of this machine, in words."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{platform.machine()}, {os.cpu_count()} cores" + (f", {', '.join(gpus)}" if gpus else ", no GPU")


def record_run(
    output: Path,
    command: str,
    options: argparse.Namespace,
    missing: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Append this run to `run.json` beside the results.

    A record holds command, seed, hardware, versions, start, hashes of the data, and what is missing.

    Args:
        output: Result folder.
        command: The exact command line.
        options: Parsed command line.
        missing: Data sets that can't be scored -> why.
        data: Data sets that can be scored -> hash of their data.

    Returns:
        The record.
    """
    output.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {
        "command": command,
        "seed": options.seed,
        "hardware": hardware(),
        "versions": {package: version(package) for package in _PACKAGES},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "missing": dict(missing or {}),
        "data": dict(data or {}),
    }
    atomic_write(output / RUN_FILE, json.dumps([*read_runs([output]), run], indent=1))
    return run


@dataclass
class Outcome:
    """What a run gave: embedding size -> one result per task, and the data sets that have none, with the reason."""

    results: dict[int | None, list[TaskResult]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def dataset_name(task: Any) -> str:
    """A task's name in a report: of our own the data set's, else mteb's."""
    return task.row.name if isinstance(task, MMEBRetrieval) else task.metadata.name


def reason(error: BaseException) -> str:
    """An error in one line, with what caused it."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    cause = error.__cause__
    behind = f" ({reason(cause)})" if cause is not None and str(cause) not in str(error) else ""
    return f"{type(error).__name__}: {first}{behind}"


def load_tasks(tasks: Iterable[Any]) -> tuple[list[Any], dict[str, str]]:
    """Read the data of all tasks of ours, before anything is encoded.

    Args:
        tasks: Tasks; mteb's own are not read, because they may be large downloads.

    Returns:
        The tasks whose data could be read, and the others' data sets with the reason.
    """
    ready, missing = [], {}
    for task in tasks:
        try:
            if isinstance(task, MMEBRetrieval):
                task.load_data()
            ready.append(task)
        except Exception as error:  # whatever is wrong with one data set, the others can be scored
            if is_full(error):
                raise
            logger.debug("%s can't be read", dataset_name(task), exc_info=True)
            missing[dataset_name(task)] = reason(error)
    return ready, missing


def is_full(error: BaseException) -> bool:
    """Whether an error is a full disk's, whichever library reports it."""
    return "No space left on device" in str(error) or getattr(error, "errno", None) == errno.ENOSPC


def _data_of(task: Any) -> str:
    """Which data a task is scored on, as its result tells it."""
    return task.digest if isinstance(task, MMEBRetrieval) else str(task.metadata.dataset["revision"])


def unsupported(task: MMEBRetrieval, modalities: Collection[str]) -> str:
    """What keeps a model from a task of ours, empty where nothing does.

    Args:
        task: The task.
        modalities: What the model takes.

    Returns:
        The reason.
    """
    needed = {part for side in PromptType for part in task.metadata.get_modalities(side)}
    lacking = sorted(needed - set(modalities))
    return f"the model does not support {lacking}: it takes {sorted(modalities)}" if lacking else ""


def describe_prompts(
    tasks: Iterable[MMEBRetrieval], wrapper: SentenceTransformerEncoderWrapper | MultiVectorWrapper
) -> list[str]:
    """What becomes of a model's own prompts in MMEB-V2.

    Args:
        tasks: Its data sets, loaded.
        wrapper: The model.

    Returns:
        A line for each side where the model has a prompt, with the first instruction that it meets.
    """
    fates = {
        "model": "stands where the task has no instruction",
        "task": "is left out: the task's instruction takes its place (--model_prompts keeps both)",
        "both": "stands before the task's instruction",
    }
    lines: dict[str, str] = {}
    for task in tasks:
        for side, entry in task.prompts_of(wrapper).items():
            if entry["model"]:
                line = f"the model's own {side} prompt {entry['model']!r} {fates[entry['shown']]}"
                example = f", as in {task.row.name}: {entry['task']!r}" if entry["task"] else ""
                lines.setdefault(line, line + example)
    return list(lines.values())


def variants(model: SentenceTransformer | MultiVectorEncoder, sizes: Sequence[int] | None) -> list[dict[str, int]]:
    """What to score of one checkpoint.

    Args:
        model: The model.
        sizes: Embedding sizes; default the model's own.

    Returns:
        One `{"truncate_dim": size}` for each size, empty for the whole embedding.

    Raises:
        ValueError: A size beyond the embedding's, or a model with many vectors per input.
    """
    if not sizes:
        return [{}]
    if isinstance(model, MultiVectorEncoder):
        raise ValueError("--truncate_dims is for models with one vector per input, this one has many: leave it out")
    with model.truncate_embeddings(None):
        width = model.get_embedding_dimension() or 0
    if sizes[-1] > width:
        raise ValueError(f"--truncate_dims asks for {sizes[-1]} numbers, but the embeddings have {width}")
    return [{} if size == width else {"truncate_dim": size} for size in sizes]


def run(
    options: argparse.Namespace, command: str, model: SentenceTransformer | MultiVectorEncoder | None = None
) -> Outcome:
    """Evaluate, and record the run.

    Args:
        options: Parsed command line.
        command: The exact command line, for the record.
        model: A model in memory, in place of the one that the options name.

    Returns:
        The results, and what is missing.

    Raises:
        ValueError: A setting that doesn't fit the suite or the model.
        OSError: The disk is full; what was stored before is whole.
    """
    # 1. what there is to score: all data are read, and what can't be is listed before the first encoding
    benchmark = build_suite(options)
    ready, missing = load_tasks(benchmark.tasks)
    # 2. the model, and what of the rest it can't take
    devices = options.device or [None]
    model = load_model(options.model, options.pooling, devices[0]) if model is None else model
    asked = variants(model, options.truncate_dims)
    tasks = []
    modalities = wrap(model, "x").mteb_model_meta.modalities or ["text"]
    for task in ready:
        lacking = unsupported(task, modalities) if isinstance(task, MMEBRetrieval) else ""
        if lacking:
            missing[dataset_name(task)] = lacking
        else:
            tasks.append(task)
    output = Path(options.output_dir)
    data = {dataset_name(task): _data_of(task) for task in tasks}
    record = record_run(output, command, options, missing, data)
    if missing:
        print(f"{len(missing)} of {len(benchmark.tasks)} data sets can't be scored, {len(tasks)} are:")
        print("".join(f"  {name}: {why}\n" for name, why in missing.items()), end="", flush=True)
    # 3. the scores
    outcome = Outcome(missing=dict(missing))
    pool = model.start_multi_process_pool(devices) if len(devices) > 1 else None
    try:
        for experiment in asked if tasks else ():
            if options.truncate_dims and isinstance(model, SentenceTransformer):
                model.truncate_dim = experiment.get("truncate_dim")
            _score(options, model, experiment, tasks, pool, outcome)
    finally:
        if pool is not None:
            model.stop_multi_process_pool(pool)
    _record_missing(output, record, outcome.missing)
    return outcome


def _score(
    options: argparse.Namespace,
    model: SentenceTransformer | MultiVectorEncoder,
    experiment: Mapping[str, int],
    tasks: Sequence[Any],
    pool: Any,
    outcome: Outcome,
) -> None:
    """One embedding size on every task; a task that fails is listed, and the next one follows."""
    output = Path(options.output_dir)
    wrapper = wrap(model, stored_name(options), experiment=experiment)
    folder = "-".join([str(wrapper.mteb_model_meta.revision), *map(str, experiment.values())])
    predictions = output / "predictions" / folder if options.sheets else None
    for file in predictions.glob("*.json") if predictions else ():
        read_json(file)  # a torn one would stop mteb, which adds to what is there
    encode_options: dict[str, Any] = {"batch_size": options.batch_size} | ({"pool": pool} if pool else {})
    stock = [task for task in tasks if not isinstance(task, MMEBRetrieval)]
    cache = WholeResultCache(output, {task.metadata.name: task.metadata.dataset["revision"] for task in stock})
    if options.suite == "mmeb-v2":
        print("".join(f"{line}\n" for line in describe_prompts(tasks, wrapper)), end="", flush=True)
    results: list[TaskResult] = []
    for task in tasks:
        try:
            found = mteb.evaluate(
                wrapper,
                task,
                cache=cache,
                encode_kwargs=encode_options,  # type: ignore[arg-type]
                co2_tracker=False,
                prediction_folder=predictions,
                overwrite_strategy="always" if options.overwrite else "only-missing",
            )
        except Exception as error:
            if is_full(error):
                raise
            outcome.missing[dataset_name(task)] = reason(error)
            logger.error("%s can't be scored: %s", dataset_name(task), reason(error))
            if not isinstance(error, ValueError | OSError):
                logger.error("where it happened:", exc_info=True)
            continue
        for failed in found.exceptions or ():  # mteb passes over private tasks
            outcome.missing[dataset_name(task)] = failed.exception.strip().partition("\n")[0]
        # a stored result may hold further languages, which another benchmark asked for
        results += [
            result if isinstance(task, MMEBRetrieval) else result.validate_and_filter_scores(task)
            for result in found.task_results
        ]
        if predictions and isinstance(task, MMEBRetrieval):
            _write_sheet(task, predictions, output / "sheets" / folder)
    outcome.results[wrapper.model.get_embedding_dimension()] = results


def _record_missing(output: Path, run: Mapping[str, Any], missing: Mapping[str, str]) -> None:
    """Note in this run's record, which need not be the last one, what turned out to be missing."""
    runs = [{**known, "missing": dict(missing)} if known == run else known for known in read_runs([output])]
    atomic_write(output / RUN_FILE, json.dumps(runs, indent=1))


def report(options: argparse.Namespace, results: Iterable[TaskResult]) -> Path:
    """Write the report of what this run scored, beside all other models that were scored on the same.

    The whole suite is expected, so that what was not asked for is seen to be missing.

    Args:
        options: Parsed command line.
        results: What the run scored.

    Returns:
        The report.
    """
    output = Path(options.output_dir)
    if options.suite.startswith(MTEB_PREFIX):
        benchmark = stock_benchmark(options.suite.removeprefix(MTEB_PREFIX))
        choice: dict[str, Any] = {"expected": stock_suite(benchmark), "parts": stock_parts(benchmark)}
    else:
        rows = MINI if options.suite == "mini" else MMEB_V2
        entries = [entry for result in results for split in result.scores.values() for entry in split]
        samples = {
            sample(entry["mmeb_name"], entry["split_label"], entry["fraction"], entry["sample_seed"])
            for entry in entries
        }
        choice = {
            "expected": {row.name: (row.modality, row.group) for row in rows},
            "protocol": options.protocol if options.suite == "mmeb-v2" else None,
            "wanted": lambda score: sample_of(score) in samples,
        }
    return write_report([output], output / "report", seed=options.seed, **choice)


def describe(result: TaskResult) -> str:
    """A result in one line.

    Args:
        result: A task's result.

    Returns:
        Score in %, standard error, task, and for our tasks the split, the queries and the chance level.
    """
    line = f"{100 * result.get_score():6.1f}"
    entry = next(iter(result.scores.values()))[0]
    if "mmeb_name" not in entry:
        return f"{line}  {result.task_name}"
    name = result.task_name.split(DATA_MARK)[0]
    protocol = f"protocol {entry['protocol']}, " if entry.get("protocol") else ""
    broken = f", {entry['broken_rows']} broken rows left out" if entry["broken_rows"] else ""
    odd = "".join(f", {count} {what}" for what, count in entry.get("oddities", {}).items())
    if "ndcg_official" in entry:
        odd += f", nDCG@5 as the harness misaligns it {100 * entry['ndcg_official']:.1f}"
    data = f", data {entry['data_digest'][:10]}"
    data += "".join(f", {hub_id} at {version[:14]}" for hub_id, version in entry["data_versions"].items())
    return (
        f"{line} (standard error {100 * entry['standard_error']:.1f})  {name}: {protocol}"
        f"split {entry['split_label']}, {entry['num_queries']} queries{broken}{odd}, "
        f"chance {100 * entry['chance']:.1f}{data}"
    )


def _write_sheet(task: MMEBRetrieval, predictions: Path, folder: Path) -> None:
    """The sheet of a task; one that can't be drawn loses no score."""
    file = predictions / task.prediction_file_name
    if not file.is_file():
        logger.warning("%s has no sheet: its stored score came without rankings. Use --overwrite.", task.row.name)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        retrieval_sheet(task, file, folder / f"{task.metadata.name}.png")
    except (OSError, ValueError) as error:
        logger.error("the sheet of %s can't be drawn: %s", task.row.name, reason(error))
