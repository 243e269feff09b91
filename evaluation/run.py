"""Score a model.

    python -m evaluation.run --model PATH_OR_NAME --suite mini
    python -m evaluation.run --model PATH_OR_NAME --suite mmeb-v2 --data data/MMEB-V2 --subset I-VG MSVD --fraction 0.1
    python -m evaluation.run --model open_clip:ViT-B-32/laion2b_s34b_b79k --suite mini
    python -m evaluation.run --model recipes/backbone --pooling lasttoken --suite mini
    python -m evaluation.run --model PATH_OR_NAME --suite "mteb:MIEB(lite)" --device cuda:0 cuda:1
    python -m evaluation.run --model PATH_OR_NAME --suite "mteb:ViDoRe(v3)" --data snapshots --report
    python -m evaluation.run --model PATH_OR_NAME --suite mini --truncate_dims 16,32,64,128 --report

Results go to `--output_dir`, one file per data set, data and checkpoint; the same command continues a killed run, and
never shows a score of other data. Embeddings of our own suites are kept in `embeddings` there as they are made (delete
them when you are done), so a data set that was cut short continues too. Data sets that can't be read are listed before
the first encoding and the others are scored; the exit status is then 1. `--report` writes Markdown, leaderboard JSON
and figures for everything in that folder, `--sheets` a picture of queries with their results per task and checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean

from evaluation.dataset import (
    GROUPS,
    INSTRUCTION_PLACES,
    NUM_FRAMES,
    PAGE_SPLITS,
    POOLINGS,
    PROTOCOLS,
    InputSettings,
)
from evaluation.mmeb_v2.rows import select_rows

MTEB_PREFIX = "mteb:"


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
    add("--model", required=True, help="sentence-transformers model, or open_clip:<architecture>/<weights>")
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
    add("--frames", type=int, default=NUM_FRAMES, help=f"frames of a video (mmeb-v2; default: {NUM_FRAMES})")
    add(
        "--instruction",
        choices=INSTRUCTION_PLACES,
        default="user",
        help="where MMEB-V2's instruction stands: in the text, in the prompt (a system turn), nowhere (default: user)",
    )
    add("--candidate_instruction", default="", help="instruction of every candidate (default: the task's own)")
    add("--model_prompts", action="store_true", help="keep the model's own prompts beside the task's instruction")
    add("--split", default="test", help="split of mini: test, validation or train (default: test)")
    add("--seed", type=int, default=0, help="seed of the sample or drawing (default: 0)")
    add("--batch_size", type=int, default=16, help="inputs per forward pass (default: 16)")
    add("--device", nargs="+", help="one device, or several for a pool of processes (default: the best)")
    add("--output_dir", default="results", help="result folder (default: results)")
    add("--report", action="store_true", help="write <output_dir>/report afterwards")
    add("--sheets", action="store_true", help="write <output_dir>/sheets/<checkpoint>/<task>.png for our own tasks")
    add("--overwrite", action="store_true", help="encode and score again what is stored")
    options = parser.parse_args(arguments)
    check_names(options)
    return options


def check_names(options: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong in the words alone, before anything heavy is imported.

    Args:
        options: Parsed command line.

    Raises:
        ValueError: An unknown suite or data set, a setting of another suite, a folder that isn't there.
    """
    suite = options.suite
    if suite not in ("mini", "mmeb-v2") and not suite.startswith(MTEB_PREFIX):
        raise ValueError(f"unknown suite {suite!r}: use mini, mmeb-v2 or mteb:<benchmark>")
    model = Path(options.model)
    looks_local = options.model.startswith((".", "/", "~")) or len(model.parts) > 2
    if looks_local and not options.model.startswith("open_clip:") and not model.exists():
        raise ValueError(f"--model {options.model!r} is no folder, and no name on the hub has this form")
    if options.pooling and options.model.startswith("open_clip:"):
        raise ValueError(
            "--pooling reads a backbone of transformers, and open_clip's models have a pooling of their own"
        )
    _check_suite(options)
    if suite == "mini":
        known = {*GROUPS, *(f"mini-{group}" for group in GROUPS), *GROUPS.values()}
        if unknown := sorted(set(options.subset or ()) - known):
            raise ValueError(
                f"unknown subset {unknown}: use {list(GROUPS)}, a data-set name (mini-I-QA) or a modality"
            )
    if suite == "mmeb-v2":
        select_rows(options.subset)
        if not 0 < options.fraction <= 1:
            raise ValueError(f"--fraction must be in (0, 1], got {options.fraction}: 1 is the complete data set")
        if options.data is None or not Path(options.data).is_dir():
            raise ValueError(
                f"--suite mmeb-v2 needs --data, a folder with image-tasks, video-tasks or visdoc-tasks; got "
                f"{options.data!r}. Unpack the archives of huggingface.co/datasets/TIGER-Lab/MMEB-V2 there."
            )


def _check_suite(options: argparse.Namespace) -> None:
    """Refuse settings that the suite does not read."""
    settings = input_settings(options)
    if options.suite != "mmeb-v2":
        own = {
            "--frames, --instruction, --candidate_instruction and --model_prompts": settings != InputSettings(),
            "--protocol": options.protocol != PROTOCOLS[0],
            "--fraction": options.fraction != 1,
            "--page_split": options.page_split != "page-fixed",
            "--revision": bool(options.revision),
        }
        if given := [names for names, is_given in own.items() if is_given]:
            raise ValueError(f"{' and '.join(given)} are of --suite mmeb-v2, this is {options.suite}: leave them out")
    if options.suite != "mini" and options.split != "test":
        raise ValueError(f"--split is of --suite mini; {options.suite} has its own splits: leave it out")


def input_settings(options: argparse.Namespace) -> InputSettings:
    """How inputs are shown, from the command line."""
    return InputSettings(
        num_frames=options.frames,
        instruction=options.instruction,
        candidate_instruction=options.candidate_instruction,
        model_prompts=options.model_prompts,
    )


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's first lines."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="mteb")
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parse(arguments)
        # mteb, torch and transformers take seconds to import: a typo is answered before
        scoring = import_module("evaluation.scoring")
        outcome = scoring.run(options, shlex.join(["python", "-m", "evaluation.run", *words]))
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("where it happened:", exc_info=True)
        line = " ".join(str(error).split())
        raise SystemExit(f"evaluation.run: {line}") from error
    for size, results in outcome.results.items():
        if options.truncate_dims:
            print(f"first {size} numbers of the embedding:")
        for result in results:
            print(scoring.describe(result))
        if results:
            mean = fmean(result.get_score() for result in results)
            print(f"{100 * mean:6.1f}  plain mean of these {len(results)} data sets", flush=True)
    scored = [result for results in outcome.results.values() for result in results]
    if options.report and scored:
        try:
            print(f"report: {scoring.report(options, scored)}")
        except (ValueError, OSError) as error:
            raise SystemExit(f"evaluation.run: no report: {' '.join(str(error).split())}") from error
    if outcome.missing:
        names = ", ".join(outcome.missing)
        raise SystemExit(f"evaluation.run: {len(outcome.missing)} data sets have no score: {names}")


if __name__ == "__main__":
    main()
