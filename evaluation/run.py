"""Score a model.

    python -m evaluation.run --model PATH_OR_NAME --suite mini
    python -m evaluation.run --model PATH_OR_NAME --suite mmeb-v2 --data data/MMEB-V2 --subset I-VG MSVD --fraction 0.1
    python -m evaluation.run --model open_clip:ViT-B-32/laion2b_s34b_b79k --suite mini
    python -m evaluation.run --model recipes/backbone --pooling lasttoken --suite mini
    python -m evaluation.run --model PATH_OR_NAME --suite "mteb:MIEB(lite)" --device cuda:0 cuda:1
    python -m evaluation.run --model PATH_OR_NAME --suite "mteb:ViDoRe(v3)" --data snapshots --report
    python -m evaluation.run --model PATH_OR_NAME --suite mini --truncate_dims 16,32,64,128 --report

Results go to `--output_dir`, one file per data set and checkpoint; the same command continues a killed run. Embeddings
of our own suites are kept in `embeddings` there as they are made (delete them when you are done), so a data set that
was cut short continues too. `--report` writes Markdown, leaderboard JSON and figures for everything in that folder,
`--sheets` a picture of queries with their results per task and checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import mteb
import torch
from mteb import Benchmark
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer

from evaluation.atomic_write import atomic_write, read_json
from evaluation.baselines import POOLINGS, load_model
from evaluation.dataset import PROTOCOLS
from evaluation.embedding.store import EmbeddingStore
from evaluation.mini import mini_benchmark
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.mmeb_v2.visdoc import PAGE_SPLITS
from evaluation.report import RUN_FILE, read_runs, write_report
from evaluation.reporting.retrieval_sheet import retrieval_sheet
from evaluation.result_cache import WholeResultCache
from evaluation.stock import stock_benchmark, stock_suite
from evaluation.task import MMEBRetrieval, mmeb_v2_benchmark
from evaluation.wrapping import wrap

MTEB_PREFIX = "mteb:"
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
    store = EmbeddingStore(Path(options.output_dir) / "embeddings")
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
            store=store,
        )
    if options.suite.startswith(MTEB_PREFIX):
        return stock_benchmark(options.suite.removeprefix(MTEB_PREFIX), options.subset, options.data)
    raise ValueError(f"unknown suite {options.suite!r}: use mini, mmeb-v2 or mteb:<benchmark>")


def hardware() -> str:
    """Processors and GPUs of this machine, in words."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{platform.machine()}, {os.cpu_count()} cores" + (f", {', '.join(gpus)}" if gpus else ", no GPU")


def record_run(output: Path, command: str, options: argparse.Namespace) -> None:
    """Append this run to `run.json` beside the results: command, seed, hardware, versions, start.

    Args:
        output: Result folder.
        command: The exact command line.
        options: Parsed command line.
    """
    output.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {
        "command": command,
        "seed": options.seed,
        "hardware": hardware(),
        "versions": {package: version(package) for package in _PACKAGES},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    atomic_write(output / RUN_FILE, json.dumps([*read_runs([output]), run], indent=1))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; errors that need no model are raised here.

    Args:
        arguments: Words after the program name, default those of this process.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="SentenceTransformer name or folder, or open_clip:<architecture>/<weights>")
    add("--name", help="name to store results under (default: --model, or its last folder)")
    add("--pooling", choices=POOLINGS, help="read --model as a backbone and pool it this way")
    add("--suite", default="mini", help="mini, mmeb-v2 or mteb:<benchmark> (default: mini)")
    add("--data", help="folder with MMEB-V2's media and annotations, or with snapshots for mteb")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="vlm2vec",
        help="whose rules score mmeb-v2: the benchmark's harness, or the paper's release (default: vlm2vec)",
    )
    add("--offline", action="store_true", help="never read an annotation table from the hub")
    add("--subset", nargs="+", help="data sets, groups or modalities; tasks of mteb (default: all)")
    add("--fraction", type=float, default=1.0, help="part of the queries, in (0, 1] (mmeb-v2; default: 1)")
    add(
        "--page_split",
        choices=PAGE_SPLITS,
        default="page-fixed",
        help="version of the -page sets (default: page-fixed)",
    )
    add("--revision", nargs="+", type=_pin, help="pin annotations of MMEB-V2: CIRR=<hub commit> (default: recorded)")
    add("--truncate_dims", type=_sizes, help="score the first 16,32,64 numbers of the embeddings, from one encoding")
    add("--split", default="test", help="split of mini: test, validation or train (default: test)")
    add("--seed", type=int, default=0, help="seed of the sample or drawing (default: 0)")
    add("--batch_size", type=int, default=16, help="inputs per forward pass (default: 16)")
    add("--device", nargs="+", help="one device, or several for a pool of processes (default: the best)")
    add("--output_dir", default="results", help="result folder (default: results)")
    add("--report", action="store_true", help="write <output_dir>/report afterwards")
    add("--sheets", action="store_true", help="write <output_dir>/sheets/<checkpoint>/<task>.png for our own tasks")
    return parser.parse_args(arguments)


def _pin(text: str) -> tuple[str, str]:
    name, _, commit = text.partition("=")
    if not (name and commit):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMIT")
    return name, commit


def _sizes(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 16,32,64")
    return sorted(map(int, text.split(",")))


def stored_name(options: argparse.Namespace) -> str:
    """Name to store results under: a folder's own name, not its path; a pooling is part of it."""
    folder = Path(options.model)
    name = options.name or (f"local/{folder.resolve().name}" if folder.exists() else options.model.replace(":", "/"))
    return f"{name}-{options.pooling}" if options.pooling and not options.name else name


def variants(model: SentenceTransformer, sizes: Sequence[int] | None) -> list[dict[str, int]]:
    """What to score of one checkpoint.

    Args:
        model: The model.
        sizes: Embedding sizes; default the model's own.

    Returns:
        One `{"truncate_dim": size}` for each size, empty for the whole embedding.

    Raises:
        ValueError: A size beyond the embedding's.
    """
    if not sizes:
        return [{}]
    with model.truncate_embeddings(None):
        width = model.get_embedding_dimension() or 0
    if sizes[-1] > width:
        raise ValueError(f"--truncate_dims asks for {sizes[-1]} numbers, but the embeddings have {width}")
    return [{} if size == width else {"truncate_dim": size} for size in sizes]


def run(options: argparse.Namespace, command: str) -> dict[int | None, list[TaskResult]]:
    """Evaluate, and write what was asked for.

    Args:
        options: Parsed command line.
        command: The exact command line, for the record.

    Returns:
        Embedding size -> one result per task.
    """
    benchmark = build_suite(options)
    output = Path(options.output_dir)
    devices = options.device or [None]
    model = load_model(options.model, options.pooling, devices[0])
    asked = variants(model, options.truncate_dims)
    record_run(output, command, options)
    encode_options: dict[str, Any] = {"batch_size": options.batch_size}
    pool = model.start_multi_process_pool(devices) if len(devices) > 1 else None
    if pool is not None:
        encode_options["pool"] = pool
    results = {}
    try:
        for experiment in asked:
            if options.truncate_dims:
                model.truncate_dim = experiment.get("truncate_dim")
            wrapper = wrap(model, stored_name(options), experiment=experiment)
            folder = "-".join([str(wrapper.mteb_model_meta.revision), *map(str, experiment.values())])
            predictions = output / "predictions" / folder if options.sheets else None
            for file in predictions.glob("*.json") if predictions else ():
                read_json(file)  # a torn one would stop mteb, which adds to what is there
            found = mteb.evaluate(
                wrapper,
                benchmark,
                cache=WholeResultCache(output),
                encode_kwargs=encode_options,  # type: ignore[arg-type]
                co2_tracker=False,
                prediction_folder=predictions,
            )
            results[model.get_embedding_dimension()] = found.task_results
            if predictions:
                _write_sheets(benchmark, predictions, output / "sheets" / folder)
    finally:
        if pool is not None:
            model.stop_multi_process_pool(pool)
    if options.report:
        # the whole benchmark, so that the tasks that were not asked for are seen to be missing
        name = options.suite.removeprefix(MTEB_PREFIX)
        suite = stock_suite(stock_benchmark(name)) if options.suite.startswith(MTEB_PREFIX) else None
        protocol = options.protocol if options.suite == "mmeb-v2" else None
        write_report([output], output / "report", expected=suite, protocol=protocol, seed=options.seed)
    return results


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
    protocol = f"protocol {entry['protocol']}, " if entry.get("protocol") else ""
    broken = f", {entry['broken_rows']} broken rows left out" if entry["broken_rows"] else ""
    odd = "".join(f", {count} {what}" for what, count in entry.get("oddities", {}).items())
    if "ndcg_official" in entry:
        odd += f", nDCG@5 as the harness misaligns it {100 * entry['ndcg_official']:.1f}"
    data = "".join(f", {hub_id} at {version[:14]}" for hub_id, version in entry["data_versions"].items())
    return (
        f"{line} (standard error {100 * entry['standard_error']:.1f})  {result.task_name}: {protocol}"
        f"split {entry['split_label']}, {entry['num_queries']} queries{broken}{odd}, "
        f"chance {100 * entry['chance']:.1f}{data}"
    )


def _write_sheets(benchmark: Benchmark, predictions: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for task in benchmark.tasks:
        file = predictions / task.prediction_file_name
        if isinstance(task, MMEBRetrieval) and file.is_file():
            retrieval_sheet(task, file, folder / f"{task.metadata.name}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's first lines."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="mteb")
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    scored = run(options, shlex.join(["python", "-m", "evaluation.run", *words]))
    for size, results in scored.items():
        if options.truncate_dims:
            print(f"first {size} numbers of the embedding:")
        for result in results:
            print(describe(result))
        mean = fmean(result.get_score() for result in results)
        print(f"{100 * mean:6.1f}  plain mean of these {len(results)} data sets")


if __name__ == "__main__":
    main()
