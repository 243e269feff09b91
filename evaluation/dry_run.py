"""The whole way of MMEB-V2 on synthetic data of the real size: load, encode, score, report, and what each set costs.

    python -m evaluation.dry_run --fraction 0.1
    python -m evaluation.dry_run --fraction 1 --subset MSCOCO_t2i NExTQA VATEX
    python -m evaluation.dry_run --fraction 0.02 --faults

No data set and no model are needed: every set is written in the layout of the real one (`mmeb_v2.layouts`), with its
number of rows times the fraction and tiny media, and the encoder answers at once. What is left is our own time and
memory, so that nobody meets a quadratic loop on the day the archives are there. Scores mean nothing here. `--faults`
shows what `evaluation.run` does where one set is missing, one is torn and one is unpacked further after it was scored.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from evaluation.dataset import PROTOCOLS, MMEBDataset, Protocol
from evaluation.embedding.store import EmbeddingStore
from evaluation.markdown import table
from evaluation.mmeb_v2.layouts import FullSize
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.report import write_report
from evaluation.result_cache import WholeResultCache
from evaluation.run import parse
from evaluation.scoring import run
from evaluation.task import mmeb_task, select_rows
from evaluation.wrapping import wrap

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Instant(torch.nn.Module):
    """A SentenceTransformer's only module that embeds any input in constant time: a drawn vector.

    Args:
        width: Numbers per embedding.
    """

    modalities = ["text", "image", "video", "message", ("image", "text"), ("text", "video")]

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.weight = torch.nn.Parameter(torch.ones(1))
        self._draw = np.random.default_rng(0)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """One vector an input, whatever it is; `prompt` and `kwargs` are ignored."""
        return {"drawn": torch.from_numpy(self._draw.standard_normal((len(inputs), self.width), np.float32))}

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Adds `sentence_embedding`, (inputs, width)."""
        return {**features, "sentence_embedding": features["drawn"] * self.weight}

    def get_embedding_dimension(self) -> int:
        """Numbers per embedding."""
        return self.width

    get_sentence_embedding_dimension = get_embedding_dimension  # the older name, which mteb asks for


@dataclass
class Cost:
    """What one data set took: counts, processor seconds of each stage, and the peak memory of the process in MB."""

    name: str
    queries: int = 0
    corpus: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage in processor time, which a busy machine doesn't change."""
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start


def dry_run(row: MMEBDataset, fraction: float, output: Path, model: SentenceTransformer, protocol: Protocol) -> Cost:
    """Take one data set the whole way.

    Args:
        row: The data set.
        fraction: Part of its real number of rows, in (0, 1].
        output: Result folder.
        model: The encoder.
        protocol: Whose rules.

    Returns:
        What it cost. The data are written to a folder of their own and deleted.
    """
    cost = Cost(row.name)
    with tempfile.TemporaryDirectory() as folder:
        with cost.stage("write"):
            written = FullSize(row, Path(folder), fraction).write()
        # `datasets` keeps what it reads; here that goes with the data
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        reset_peak()
        task = mmeb_task(written, DataRoot(Path(folder), offline=True), protocol=protocol, store=EmbeddingStore())
        with cost.stage("load"):
            task.load_data()
        data = task.dataset["default"]["test"]
        cost.queries, cost.corpus = len(data["queries"]), len(data["corpus"])
        with cost.stage("encode and score"):
            wrapper, cache = wrap(model, "local/instant"), WholeResultCache(output)
            mteb.evaluate(wrapper, task, cache=cache, co2_tracker=False, show_progress_bar=False)
        cost.peak = peak_memory()
    return cost


def dry_run_faults(fraction: float, output: Path, model: SentenceTransformer) -> str:
    """Run `evaluation.run` twice on four data sets, three of which have something wrong with them.

    Args:
        fraction: Part of the real number of rows, in (0, 1].
        output: Result folder.
        model: The encoder.

    Returns:
        A Markdown table: what was wrong, and what either run said.
    """
    rows = {row.name: row for row in select_rows(["GQA", "HMDB51", "ViDoRe_docvqa", "MSVD"])}
    wrong = {
        "GQA": "nothing",
        "HMDB51": "never unpacked",
        "ViDoRe_docvqa": "the page table is cut in half",
        "MSVD": "a third of the videos is unpacked after the first run",
    }
    with tempfile.TemporaryDirectory() as folder:
        root, later = Path(folder) / "data", Path(folder) / "later"
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for name in ("GQA", "ViDoRe_docvqa", "MSVD"):
            FullSize(rows[name], root, fraction).write()
        torn = next((root / rows["ViDoRe_docvqa"].annotation / "corpus").iterdir())
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
        videos = root / rows["MSVD"].media_roots[0]
        late = sorted(videos.iterdir())[::3]
        later.mkdir()
        for video in late:
            video.rename(later / video.name)
        words = ["--model", "local/instant", "--suite", "mmeb-v2", "--data", str(root), "--offline"]
        options = parse([*words, "--subset", *rows, "--output_dir", str(output)])
        said: list[dict[str, str]] = []
        for _ in range(2):
            outcome = run(options, "python -m evaluation.dry_run --faults", model)
            found = {name: why.replace(folder, "...") for name, why in outcome.missing.items()}
            for result in next(iter(outcome.results.values())):
                entry = result.scores["test"][0]
                found[entry["mmeb_name"]] = f"{entry['num_queries']} queries, data `{entry['data_digest'][:10]}`"
            said.append(found)
            for video in later.iterdir():
                video.rename(videos / video.name)
    return table(
        ["data set", "what is wrong", "first run", "second run"],
        [[name, wrong[name], *(found[name][:160] for found in said)] for name in rows],
    )


def reset_peak() -> None:
    """Start the peak anew where the system can (Linux); elsewhere it stays that of the whole process."""
    if _RESET.exists():
        _RESET.write_text("5")


def peak_memory() -> float:
    """Peak resident memory in MB, since `reset_peak` where that works."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def cost_table(costs: Sequence[Cost]) -> str:
    """The costs as Markdown, one line a data set and their sum.

    Args:
        costs: What each data set cost.

    Returns:
        The table.
    """
    stages = ["write", "load", "encode and score"]
    head = ["data set", "queries", "corpus", *(f"{stage}, s" for stage in stages), "ms / query", "peak, MB"]
    lines = []
    for cost in costs:
        spent = cost.seconds["load"] + cost.seconds["encode and score"]
        numbers = [f"{cost.seconds[stage]:.2f}" for stage in stages]
        each = f"{1000 * spent / cost.queries:.1f}"
        lines.append([cost.name, f"{cost.queries:,}", f"{cost.corpus:,}", *numbers, each, f"{cost.peak:,.0f}"])
    sums = [f"{sum(cost.seconds[stage] for cost in costs):.1f}" for stage in stages]
    queries, corpus = sum(cost.queries for cost in costs), sum(cost.corpus for cost in costs)
    lines.append(["all", f"{queries:,}", f"{corpus:,}", *sums, "", f"{max(cost.peak for cost in costs):,.0f}"])
    return table(head, lines, numbers=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.dry_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--fraction", type=float, default=0.1, help="part of the real number of rows, in (0, 1] (default: 0.1)")
    add("--subset", nargs="+", help="data sets, groups or modalities (default: all 78)")
    add("--protocol", choices=PROTOCOLS, default="vlm2vec", help="whose rules (default: vlm2vec)")
    add("--faults", action="store_true", help="four data sets with one missing, one torn and one changed, run twice")
    add("--output_dir", help="keep results and report in this folder (default: delete them)")
    options = parser.parse_args(arguments)
    if not 0 < options.fraction <= 1:
        parser.error(f"--fraction must be in (0, 1], got {options.fraction}")
    words = sys.argv[1:] if arguments is None else list(arguments)
    datasets.disable_progress_bars()
    model = SentenceTransformer(modules=[Instant()], device="cpu")
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(options.output_dir or folder)
        if options.faults:
            shown = dry_run_faults(options.fraction, output, model)
            print(f"`{shlex.join(['python', '-m', 'evaluation.dry_run', *words])}`\n\n{shown}")
            return
        for row in select_rows(options.subset):
            costs.append(dry_run(row, options.fraction, output, model, options.protocol))
            print(f"{costs[-1].name}: {costs[-1].seconds}, {costs[-1].peak:,.0f} MB", file=sys.stderr, flush=True)
        start = time.process_time()
        reset_peak()
        write_report([output], output / "report", protocol=options.protocol)
        report = f"Report: {time.process_time() - start:.1f} s, {peak_memory():,.0f} MB."
    print(f"`{shlex.join(['python', '-m', 'evaluation.dry_run', *words])}`\n\n{cost_table(costs)}\n\n{report}")


if __name__ == "__main__":
    main()
