"""Result folders into a report people can read: Markdown, leaderboard JSON and figures.

    python -m evaluation.report results --output_dir report
    python -m evaluation.report results --protocol btoks
    python -m evaluation.report results --suite "mteb:ViDoRe(v3)"

Models stand side by side. Every table names its split and protocol; a mean over an incomplete set carries the count of
its data sets, and a mean with left-out queries a `~`. Differences come with a paired bootstrap over queries.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluation.atomic_write import read_json
from evaluation.dataset import PROTOCOLS
from evaluation.markdown import table
from evaluation.mini import MINI
from evaluation.reporting.figures import group_bars, size_plot
from evaluation.reporting.leaderboard import leaderboard_entry
from evaluation.reporting.scores import (
    OVERALL,
    STOCK,
    Mean,
    ModelScores,
    Score,
    expected_datasets,
    paired_bootstrap,
    read_results,
    summarize,
)
from evaluation.stock import stock_benchmark, stock_parts, stock_suite

RUN_FILE = "run.json"
"""Written by `evaluation.run` beside the results: command, seed, hardware and versions of every run."""


def write_report(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    expected: Mapping[str, tuple[str, str]] | None = None,
    parts: Mapping[str, Set[tuple[str, str]]] | None = None,
    protocol: str | None = None,
    wanted: Callable[[Score], bool] = lambda score: True,
    seed: int = 0,
) -> Path:
    """Write `report.md`, one `<model>.json` each, `groups.png` and `sizes.png`.

    Args:
        folders: mteb result folders.
        output: Folder to write to, made if needed.
        expected: The complete suite, name -> (modality, group); results of other suites are left out. Default: MMEB-V2
            or the mini benchmark, whichever the results belong to, or the tasks of mteb that are there.
        parts: Of mteb's tasks: the splits and languages that count, see `read_results`.
        protocol: Use results of this protocol only (`vlm2vec` or `btoks`); needed where the folders hold both.
        wanted: Whether a score is one of those to report.
        seed: Seed of the bootstrap.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: Models of different splits or protocols: their averages can't be compared.
    """
    runs = read_runs(folders)
    used = [digest for run in runs for digest in (run.get("data") or {}).values()]
    models = read_results(folders, used=used, parts=parts, wanted=wanted)
    if expected is not None:
        models = only(models, expected)
    models = [model for model in models if protocol in (None, model.protocol)]
    if not models:
        raise ValueError(f"no result of protocol {protocol!r}, or none of the suite asked for: leave the choice out")
    labels = sorted({model.split_label for model in models})
    if len(labels) != 1:
        raise ValueError(f"the folders hold results of the splits {labels}: write one report for each")
    protocols = sorted({model.protocol for model in models})
    if len(protocols) != 1:
        raise ValueError(
            f"the folders hold results of the protocols {protocols}, which are not comparable: write one report for "
            "each, with --protocol (in code: protocol=)"
        )
    suite = _suite(models) if expected is None else expected
    plain = {model.name for model in models}
    models = distinguish(models)
    curves = size_curves(models, suite)
    whole = {(model.name, model.revision) for model in models if not model.truncated}
    models = [model for model in models if not model.truncated or (model.name, model.revision) not in whole]
    models = [replace(m, name=f"{m.name}, first {m.size} numbers") if m.truncated else m for m in models]
    means = [summarize(model.scores, suite) for model in models]
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    group_bars(models, means, _chance(models, suite), target / "groups.png")
    if curves:
        size_plot(curves, target / "sizes.png")
    if suite == expected_datasets():
        for name in plain - {model.name for model in models}:  # of a report from before there were two of this name
            _submission(target, name).unlink(missing_ok=True)
        for model in models:
            if all(score.fraction == 1 for score in model.scores.values()):  # a part of the queries is no submission
                text = json.dumps(leaderboard_entry(model), indent=1)
                _submission(target, model.name).write_text(text, encoding="utf-8")
    sections = [
        f"# Results on split `{labels[0]}`" + (f", protocol `{protocols[0]}`" if protocols[0] else ""),
        _means_table(models, means),
        "![means per group](groups.png)",
        _sizes_table(curves),
        _datasets_table(models, suite),
        _data(models),
        _missing(models, suite, runs),
        _remarks(models),
        _differences(models, seed),
        _provenance(models, runs),
    ]
    file = target / "report.md"
    file.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return file


def _submission(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '__')}.json"


def only(models: Sequence[ModelScores], suite: Mapping[str, tuple[str, str]]) -> list[ModelScores]:
    """The models with the scores of one suite alone, without models that have none.

    Args:
        models: The models.
        suite: Its data sets, name -> (modality, group).

    Returns:
        Copies with the scores of the suite.
    """
    kept = []
    for model in models:
        scores = {name: score for name, score in model.scores.items() if name in suite}
        if scores:
            kept.append(replace(model, scores=scores))
    return kept


def size_curves(models: Sequence[ModelScores], suite: Mapping[str, tuple[str, str]]) -> dict[str, dict[int, Mean]]:
    """Quality against embedding size.

    Args:
        models: The models, with their truncations.
        suite: All data sets of the suite.

    Returns:
        Model -> numbers per embedding -> mean over all data sets; empty when there is one size only.
    """
    curves: dict[str, dict[int, Mean]] = {}
    for model in models:
        mean = summarize(model.scores, suite)[OVERALL]
        if model.size and mean.present:
            curves.setdefault(model.name, {})[model.size] = mean
    return curves if len({size for curve in curves.values() for size in curve}) > 1 else {}


def _sizes_table(curves: Mapping[str, Mapping[int, Mean]]) -> str:
    if not curves:
        return ""
    sizes = sorted({size for curve in curves.values() for size in curve})
    rows = [
        [str(size), *(_cell(curve[size]) if size in curve else "-" for curve in curves.values())] for size in sizes
    ]
    head = "## Embedding size\n\nMean over all data sets, by numbers per embedding.\n\n"
    return f"{head}{table(['numbers', *curves], rows)}\n\n![quality against size](sizes.png)"


def distinguish(models: Sequence[ModelScores]) -> list[ModelScores]:
    """Give checkpoints that share a name, or one checkpoint that was shown inputs in several ways, a name each.

    Args:
        models: The models.

    Returns:
        The same, with the start of the revision behind names that occur more than once, and the way inputs were shown
        where it is not the harness's.
    """
    known: dict[str, set[str]] = {}
    for model in models:
        known.setdefault(model.name, set()).add(model.revision)
    named = []
    for model in models:
        name = f"{model.name}@{model.revision[:8]}" if len(known[model.name]) > 1 else model.name
        shown = f" ({', '.join(model.inputs.split('.')[1:])})" if model.inputs else ""
        named.append(replace(model, name=name + shown))
    return named


def data_of(models: Sequence[ModelScores]) -> dict[str, dict[str, list[str]]]:
    """Whose data was which.

    Args:
        models: The models.

    Returns:
        Data set -> hash of the data -> the models that were scored on them, for data sets where there are several.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for model in models:
        for name, score in model.scores.items():
            found.setdefault(name, {}).setdefault(score.data, []).append(model.name)
    return {name: owners for name, owners in found.items() if len(owners) > 1}


def _data(models: Sequence[ModelScores]) -> str:
    """Data sets whose scores can't be compared, because the data differ, and scores that newer ones replaced."""
    rows = []
    for name, owners in data_of(models).items():
        for digest, names in owners.items():
            counts = {m.scores[name].num_queries for m in models if m.name in names and name in m.scores}
            rows.append([name, f"`{digest[:15] or 'unknown'}`", ", ".join(map(str, sorted(counts))), ", ".join(names)])
    lines = []
    if rows:
        lines += [
            "These scores are of different data, so their models are not compared on them, and means that hold them "
            "are not of one thing. A hash that begins with `before` is of a result from before hashes were kept.",
            table(["data set", "data", "queries", "models"], rows),
        ]
    older = {model.name: model.older for model in models if model.older}
    if older:
        lines.append("Scored on several versions of the data; the one that was scored last counts:")
        lines.append("\n".join(f"- {model}: {', '.join(names)}." for model, names in older.items()))
    return "\n\n".join(["## Different data", *lines]) if lines else ""


def _missing(
    models: Sequence[ModelScores], suite: Mapping[str, tuple[str, str]], runs: Sequence[Mapping[str, Any]]
) -> str:
    """Which data sets have no score, and what the runs said of those that they could not score."""
    lines = []
    for model in models:
        absent = [name for name in suite if name not in model.scores]
        if absent:
            lines.append(f"- {model.name}: {len(absent)} of {len(suite)}: {', '.join(absent)}.")
    reasons = {
        f"- {name}: {why}"
        for run in runs
        for name, why in (run.get("missing") or {}).items()
        if name in suite and not all(name in model.scores for model in models)
    }
    # A score that the last run could not repeat is of data that are no longer there.
    last = (runs[-1].get("missing") or {}) if runs else {}
    reasons |= {
        f"- {name}: {why} Its score is of an earlier run."
        for name, why in last.items()
        if name in suite and all(name in model.scores for model in models)
    }
    if not (lines or reasons):
        return ""
    told = (
        ["What the runs said of data sets that they could not score:", "\n".join(sorted(reasons))] if reasons else []
    )
    return "\n\n".join(["## Missing data sets", *(["\n".join(lines)] if lines else []), *told])


def _suite(models: Sequence[ModelScores]) -> dict[str, tuple[str, str]]:
    """All data sets of the suite that the results belong to, so that what is missing is seen to be missing."""
    seen = {name for model in models for name in model.scores}
    mini: dict[str, tuple[str, str]] = {row.name: (row.modality, row.group) for row in MINI}
    for suite in (expected_datasets(), mini):
        if seen <= suite.keys():
            return suite
    scores = [score for model in models for score in model.scores.values()]
    if all(score.modality == STOCK for score in scores):  # which benchmark was meant is not written in its results
        return {score.dataset: (STOCK, score.group) for score in scores}
    raise ValueError(f"{sorted(seen)} are of no known suite: pass `expected`, name -> (modality, group)")


def _chance(models: Sequence[ModelScores], suite: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """Chance levels of the labels whose data sets all state one; the same means as the scores'."""
    known = {name: s.chance for model in models for name, s in model.scores.items() if not math.isnan(s.chance)}
    levels = {}
    for label in {part for place in suite.values() for part in place} | {"All"}:
        names = [name for name, place in suite.items() if label in (*place, "All")]
        if all(name in known for name in names):
            levels[label] = fmean(known[name] for name in names)
    return levels


def _cell(mean: Mean) -> str:
    return f"{mean.text()}{_interval(mean.standard_error)}" if mean.present else "-"


def _interval(standard_error: float) -> str:
    """A 95 % interval in %, nothing where no error is known."""
    return "" if math.isnan(standard_error) else f" ± {196 * standard_error:.1f}"


def _means_table(models: Sequence[ModelScores], means: Sequence[Mapping[str, Mean]]) -> str:
    rows = [[label, *(_cell(mean[label]) for mean in means)] for label in means[0]]
    notes = (
        "Plain means over data sets, in %, with 95 % intervals over queries. `(n of m)`: data sets are missing; "
        "`~`: queries are missing (broken data left out, or a fraction asked). Neither is the suite's score."
    )
    return f"## Means\n\n{table(['', *(model.name for model in models)], rows)}\n\n{notes}"


def _datasets_table(models: Sequence[ModelScores], suite: Mapping[str, tuple[str, str]]) -> str:
    rows = []
    for name, (_, group) in suite.items():
        found = [model.scores.get(name) for model in models]
        if not any(found):
            continue
        first = next(score for score in found if score)
        chance = "-" if math.isnan(first.chance) else f"{100 * first.chance:.1f}"
        asked = {(score.num_queries, score.expected_queries) for score in found if score}
        counts = [f"{number} of {expected}" if expected else "-" for number, expected in sorted(asked)]
        values = [f"{100 * score.value:.1f}{_interval(score.standard_error)}" if score else "-" for score in found]
        rows.append([name, group, first.metric, ", ".join(counts), chance, *values])
    head = ["data set", "group", "metric", "queries", "chance", *(model.name for model in models)]
    return f"## Data sets\n\n{table(head, rows)}"


def _remarks(models: Sequence[ModelScores]) -> str:
    """What was scored although it is odd, and the harness' own number where ours can't equal it."""
    lines = dict.fromkeys(
        f"- {score.dataset}: {count} {what}."
        for model in models
        for score in model.scores.values()
        for what, count in score.details.get("oddities", {}).items()
    )
    broken = {
        (s.dataset, s.details["broken_rows"]): None
        for m in models
        for s in m.scores.values()
        if s.partial and s.details.get("broken_rows")
    }
    lines |= {f"- {name}: {count} rows, candidates or pages were left out or missing.": None for name, count in broken}
    found = [(model, score) for model in models for score in model.scores.values() if "ndcg_official" in score.details]
    for model, score in found:
        lines[
            f"- {score.dataset}, {model.name}: {100 * score.details['ndcg_official']:.1f} as the benchmark's harness "
            "reckons nDCG@5: it pairs mixed grades with the wrong documents, so that a perfect ranking of grades 1 "
            "and 2 scores 86.0; the table has the nDCG."
        ] = None
    return "\n".join(["### Remarks", "", *lines]) if lines else ""


def _comparable(first: ModelScores, second: ModelScores, name: str) -> bool:
    """Whether both have scores of the same queries on the same data."""
    if name not in first.scores or name not in second.scores:
        return False
    ours, theirs = first.scores[name], second.scores[name]
    return ours.data == theirs.data and bool(ours.per_query.keys() & theirs.per_query.keys())


def _differences(models: Sequence[ModelScores], seed: int) -> str:
    rows = []
    for number, second in enumerate(models):
        for first in models[:number]:
            if not any(_comparable(first, second, name) for name in first.scores):
                continue
            gap = paired_bootstrap(first.scores, second.scores, seed=seed)
            sure = "yes" if gap.low > 0 or gap.high < 0 else "no"
            interval = f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
            rows.append([second.name, first.name, interval, str(gap.datasets), sure])
    if not rows:
        return ""
    head = ["model", "against", "difference, 95 % interval", "data sets", "interval excludes 0"]
    note = (
        f"Paired bootstrap over queries (not over training seeds), 2,000 redraws, seed {seed}, over the data sets "
        "that both models have on the same data."
    )
    return f"## Differences\n\n{note}\n\n{table(head, rows)}"


def _provenance(models: Sequence[ModelScores], runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for model in models:
        fractions = sorted({score.fraction for score in model.scores.values()})
        part = "" if fractions == [1.0] else f", fraction {fractions}"
        versions = ", ".join(f"{k} {v}" for k, v in sorted(model.versions.items()) if v)
        rules = f", protocol `{model.protocol}`" if model.protocol else ""
        lines.append(
            f"- {model.name}, checkpoint `{model.revision}`, split `{model.split_label}`{rules}{part}. {versions}"
        )
    read: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for item in sorted({item for score in model.scores.values() for item in _data_of(score)}):
            read.setdefault(item, []).append(model.name)
    for (hub_id, version), names in sorted(read.items()):
        whose = "" if len(names) == len(models) else f", read by {', '.join(names)}"
        lines.append(f"- data {hub_id}: {version}{whose}")
    for run in runs:
        known = {name: run.get(name, "unknown") for name in ("command", "hardware", "seed", "started")}
        lines.append("- `{command}`: {hardware}, seed {seed}, {started}".format(**known))
    return "## Provenance\n\n" + "\n".join(lines)


def _data_of(score: Score) -> list[tuple[str, str]]:
    return sorted(score.details.get("data_versions", {}).items())


def read_runs(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The runs recorded beside the results.

    Args:
        folders: mteb result folders.

    Returns:
        Records of `evaluation.run`, oldest first.
    """
    files = [Path(folder) / RUN_FILE for folder in folders]
    return sorted((run for file in files for run in read_json(file) or ()), key=lambda run: run.get("started", ""))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="result folders, of one or more models")
    parser.add_argument("--output_dir", default="report", help="folder to write to (default: report)")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="use results of this protocol (default: what is there)")
    parser.add_argument("--suite", help="mteb:<benchmark>: its tasks alone, missing ones counted")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    options = parser.parse_args(arguments)
    try:
        choice: dict[str, Any] = {"protocol": options.protocol, "seed": options.seed}
        if options.suite:
            benchmark = stock_benchmark(options.suite.removeprefix("mteb:"))
            choice |= {"expected": stock_suite(benchmark), "parts": stock_parts(benchmark)}
        write_report(options.folders, options.output_dir, **choice)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluation.report: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
