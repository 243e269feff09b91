"""The study end to end on a tiny backbone: every stage, going on after a kill, what it refuses, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from recipes import study as study_room
from recipes.command_line import parse
from recipes.research.prompted import prompted_model
from recipes.research.variant import Variant
from recipes.study import jobs
from recipes.study.costs import Costs
from recipes.study.jobs import Job
from recipes.study.report import groups_of, table
from recipes.study.runs import Log, Wanted, best_rate
from recipes.study.settings import StudyConfig
from recipes.study.study import Study
from recipes.study.variants import BASELINE, HEADLINES, VARIANTS
from tests.backbones import build

RESULTS = Path(study_room.__file__).parent / "results"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, and a corpus that stands where the study would have written it."""
    path = tmp_path_factory.mktemp("study")
    backbone, processor = build("llama")
    backbone.save_pretrained(path / "backbone")
    processor.save_pretrained(path / "backbone")
    corpus = path / "study" / "corpora" / "words-40"
    corpus.mkdir(parents=True)
    for split, numbers in (("train", range(24)), ("validation", range(24, 30)), ("test", range(30, 38))):
        rows = [{"query_text": f"word {n}", "positive_text": f"the meaning of the {n}th word"} for n in numbers]
        (corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpus / "samples.png").touch()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def config(folder, **options):
    defaults = {
        "steps": 6,
        "seeds": 2,
        "batch_size": 4,
        "limit": 40,
        "candidates": 8,
        "device": "cpu",
        "rates": [1e-2],
    }
    options = {"variants": ["BToks, condensation 0.2"], "corpora": ["words"], "tuning": "full", **defaults, **options}
    return StudyConfig(output_dir=str(folder / "study"), backbones=[str(folder / "backbone")], **options)


def test_every_arm_is_one_that_can_be_built():
    assert BASELINE in HEADLINES and set(HEADLINES) <= set(VARIANTS)
    for name, variant in VARIANTS.items():
        assert variant.build(30).pooling in ("btok", "lasttoken", "mean"), name
    assert VARIANTS["condensation first"].build(30).options["condensation_warmup"] == 10
    assert VARIANTS["BToks, condensation 1"].has_condensation
    assert not VARIANTS["BToks"].has_condensation and not VARIANTS["mean"].has_condensation


def test_lines_and_commands_of_older_runs_are_understood(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"arm": "BToks, term 0.2", "seed": 0}\n{"variant": "newline start", "seed": 1}\n')
    assert [line["variant"] for line in Log(path).lines] == ["BToks, condensation 0.2", "newline start"]
    config = parse(StudyConfig, ["--arms", "line break start, term 0.2", "BToks"])
    assert config.variants == [BASELINE, "BToks", "newline start, condensation 0.2"]


@pytest.mark.parametrize("name", ["runs.jsonl", "h100/runs.jsonl", "prompted/runs.jsonl", "costs.jsonl"])
def test_every_committed_line_is_of_a_variant_that_there_is(name, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text((RESULTS / name).read_text())
    lines = Log(path).lines
    assert lines and {line["variant"] for line in lines} <= set(VARIANTS)


def test_runs_are_made_once_and_in_a_comparable_order(folder, capsys):
    """Two rates on validation, then a seed after the other at the better one; a second call makes nothing."""
    variants = ["BToks, condensation 0.2", "unlabelled first", "condensation first"]
    options = {"variants": variants, "rates": [1e-2, 1e-9], "rate_steps": 6}
    study = Study(config(folder, **options))
    assert study.plan().startswith("0 runs are there, 16 are to be made"), (
        "four variants: two rates and two seeds each"
    )
    study.measure()
    variants = [BASELINE, "BToks, condensation 0.2", "condensation first", "unlabelled first"]
    costs = [json.loads(line) for line in study.costs.log.path.read_text().splitlines()]
    assert [(line["variant"], line["round"]) for line in costs] == [
        (variant, r) for r in range(2) for variant in variants
    ]
    assert all(line["seconds"] > 0 and line["corpus"] == "words" for line in costs)
    # What the variants cost here is noise on this backbone: set, so that the runs at equal time are known.
    for line in study.costs.log.lines:
        line["seconds"] = {BASELINE: 1.0, "BToks, condensation 0.2": 1.5, "condensation first": 1.04}.get(
            line["variant"], 0.75
        )
    study.run()
    capsys.readouterr()
    lines = [json.loads(line) for line in study.log.path.read_text().splitlines()]
    assert [line["split"] for line in lines[:8]] == ["validation"] * 8
    finals = [(line["variant"], line["seed"], line["steps"]) for line in lines[8:]]
    timed = [("BToks, condensation 0.2", 4), ("unlabelled first", 8)]
    assert finals == [
        (variant, seed, steps)
        for seed in range(2)
        for variant, steps in [*((variant, 6) for variant in variants), *timed]
    ]
    for line in lines:
        assert all(np.isfinite(line["loss"])) and len(line["ranks"]) == 2 and line["seconds_a_step"] > 0
    chosen = {line["variant"]: line["rate"] for line in lines[8:]}
    for variant in chosen:
        scores = {line["rate"]: line for line in lines[:8] if line["variant"] == variant}
        means = {
            rate: np.mean([1 / r for ranks in line["ranks"].values() for r in ranks]) for rate, line in scores.items()
        }
        assert means[chosen[variant]] == max(means.values())
    warm = next(line for line in lines[8:] if line["variant"] == "condensation first")
    assert warm["loss"][:2] == [0, 0] and min(warm["loss"][2:]) > 0 and len(warm["condensation"]) == 6
    after = next(line for line in lines[8:] if line["variant"] == "unlabelled first")
    assert len(after["loss"]) == 4 and after["steps"] == 6, "two steps are the first phase's"
    probed = next(line for line in lines[8:] if line["variant"] == "BToks, condensation 0.2")
    assert list(probed["conflict"]) == ["0", "1", "3", "5"] and probed["information"].keys() == {"own", "other"}
    # A torn line is made again, nothing else; by workers, as by this process.
    whole = study.log.path.read_text()
    study.log.path.write_text(whole[: len(whole) - 20])
    last = lines[-1]
    again = Study(config(folder, workers=2, **options))
    again.costs.log.lines = study.costs.log.lines
    assert "19 runs are there, 1 are to be made" in again.plan()
    again.run()
    (remade,) = again.log.lines[len(lines) - 1 :]
    assert remade["ranks"] == last["ranks"] and remade["loss"] == last["loss"], "the same run in another process"
    text = again.write()
    assert "| BToks, condensation 0.2 | 2 |" in text and "saved by the own BToks" in text and "| 1.50x |" in text
    for name in ("study.md", "study.png"):
        assert (folder / "study" / name).stat().st_size > 300


def test_a_failed_run_takes_no_other_along(folder, tmp_path, monkeypatch):
    study = Study(
        StudyConfig(**(asdict(config(folder)) | {"output_dir": str(tmp_path), "seeds": 1, "equal_time": False}))
    )
    monkeypatch.setattr(jobs, "make_run", fails_for_the_baseline)
    monkeypatch.setattr(Job, "corpus", lambda self: None)
    with pytest.raises(RuntimeError, match="1 runs failed. The first: .*last token.*no memory"):
        study.run()
    assert [line["variant"] for line in study.log.lines] == ["BToks, condensation 0.2"]
    assert "1 runs are there, 1 are to be made" in Study(study.config).plan()


def fails_for_the_baseline(wanted, settings, corpus, title):
    if wanted.variant == BASELINE:
        raise torch.OutOfMemoryError("no memory")
    return asdict(wanted) | {"ranks": {"there": [1], "back": [2]}}


def test_a_training_in_bfloat16_is_another_training_on_the_same_weights(folder):
    wanted = replace(WANTED, backbone=str(folder / "backbone"), steps=3, batch_size=4)
    exact, mixed = (Job(wanted, config(folder, bf16=bf16)).make()["loss"] for bf16 in (False, True))
    assert mixed != exact
    np.testing.assert_allclose(mixed, exact, rtol=0.1)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc whether a process is there")
def test_workers_end_with_a_study_that_is_killed(tmp_path):
    """A run of its own, which says its number and waits; the study is killed as an out-of-memory killer does it."""
    script = tmp_path / "study.py"
    script.write_text(
        "import os, time, multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "from recipes.study.jobs import _start\n"
        "def run():\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with ProcessPoolExecutor(1, context, _start, (1,)) as pool:\n        pool.submit(run).result()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    study = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(study.stdout.readline())
    study.kill()
    study.wait()
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on without its study")


def test_few_pairs_leave_the_rest_unlabelled(folder):
    corpus = Job(replace(WANTED, corpus="words@10"), config(folder)).corpus()
    assert len(corpus.train["words"]) == 10 and len(corpus.unlabelled["words"]) == 14
    row = corpus.unlabelled["words"][0]
    assert row["query"] == row["positive"]
    seen = {str(row["positive"]) for row in corpus.train["words"]}
    assert not seen & {str(row["positive"]) for row in corpus.unlabelled["words"]}
    with pytest.raises(ValueError, match="asks for 100 pairs, but the corpus has 24"):
        Job(replace(WANTED, corpus="words@100"), config(folder)).corpus()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["x"]}, "variants must be of"),
        ({"corpora": ["x@3"]}, "corpora must be of"),
        ({"only": "x"}, "only must be"),
        ({"workers": 0}, "workers must be"),
        ({"steps": -1}, "steps must be"),
    ],
)
def test_what_cannot_run_is_refused_first(folder, options, message):
    with pytest.raises(ValueError, match=message):
        config(folder, **options)


def test_quick_is_the_headlines(folder):
    quick = StudyConfig(output_dir=str(folder / "other"), quick=True)
    assert quick.variants == HEADLINES and quick.backbones == ["shipped"] and quick.seeds == 2


WANTED = Wanted("b", "words", BASELINE, 0, 1e-3, 100, 32, "test")


def line(variant, seed, ranks, steps=100, **other):
    run = asdict(WANTED) | {"variant": variant, "seed": seed, "steps": steps}
    return run | {
        "ranks": {"there": ranks[:2], "back": ranks[2:]},
        "seconds_a_step": 1.0,
        "loss": [1.0] * 8,
        **other,
    }


def test_rates_come_from_the_log(tmp_path):
    log = Log(tmp_path / "runs.jsonl")
    for rate, ranks in ((1e-3, [1, 2, 4, 4]), (1e-2, [1, 1, 4, 4])):
        assert best_rate(log, WANTED, [1e-3, 1e-2]) is None
        log.add(line(BASELINE, 0, ranks) | {"rate": rate})
    assert best_rate(log, WANTED, [1e-3, 1e-2]) == 1e-2
    assert best_rate(log, WANTED, [3.0]) == 3.0


@pytest.fixture
def costs(tmp_path):
    """Two rounds, of which the second ran on a machine half as fast."""
    found = Costs(Log(tmp_path / "costs.jsonl"))
    for variant, seconds in ((BASELINE, 1.0), ("mean", 1.6), ("BToks", 1.04), ("K = 1", 0.8)):
        for number, slower in enumerate((1, 2)):
            values = {"variant": variant, "round": number, "seconds": seconds * slower}
            found.log.add({"backbone": "b", "corpus": "words", **values})
    return found


def test_equal_time_comes_from_the_costs(costs):
    steps = {
        variant: costs.equal_time_steps(replace(WANTED, variant=variant, corpus="words@250"))
        for variant in ("mean", "BToks", "K = 1", "K = 16")
    }
    assert steps == {"mean": 62, "BToks": None, "K = 1": 125, "K = 16": None}


def test_the_table_says_what_the_lines_say(costs):
    lines = [line(BASELINE, 0, [1, 2, 2, 4]), line(BASELINE, 1, [1, 2, 2, 2]), line("mean", 0, [1, 1, 1, 4])]
    lines += [line("BToks", 0, [1, 1, 1, 1]), line("K = 1", 0, [1, 1, 1, 1])]
    lines += [line("mean", 1, [1, 1, 1, 1]), line("mean", 0, [2, 2, 2, 4], steps=60)]
    (group,) = groups_of(lines, costs)
    assert group.scores(BASELINE) == pytest.approx([56.25, 62.5])
    assert group.difference("mean", "steps").mean == pytest.approx((25 + 37.5) / 2)
    assert group.difference("mean", "time").mean == pytest.approx(-12.5)  # seed 0 alone
    assert group.costs["mean"] == pytest.approx(1.6)
    assert group.difference("BToks", "time") == group.difference("BToks", "steps"), "a step costs the same"
    assert group.difference("K = 1", "time") is None, "of another cost, and not run for equal time"
    text = table([group])
    assert "| last token | 2 | 0.001 | 59.4 ± 3.1 |  |  | 1.00x |" in text
    assert "| mean | 2 | 0.001 | 90.6 ± 9.4 | +31.2 (" in text and "| -12.5 (" in text and "1.60x" in text
    assert "BToks, above" not in text, "the other variants of its pairs were not run"
    (paired,) = groups_of([*lines, line("BToks, last", 0, [1, 2, 1, 1])], costs)
    assert "| BToks, above BToks, last |  |  |  | +12.5 (" in table([paired])
    (untimed,) = groups_of(lines, Costs(Log(costs.log.path.with_name("none.jsonl"))))
    assert "not timed" in table([untimed])


def test_runs_at_two_rates_do_not_stand_for_each_other(costs):
    lines = [line(BASELINE, 0, [1, 1, 1, 1]), line("mean", 0, [2, 2, 2, 2]) | {"rate": 2e-3}]
    assert len(groups_of(lines, costs)) == 1, "each variant has a rate of its own"
    lines += [line(BASELINE, 0, [4, 4, 4, 4]) | {"rate": 2e-3}]
    first, second = groups_of(lines, costs)
    assert [group.title[-6:] for group in (first, second)] == [" 0.001", " 0.002"]
    assert first.scores(BASELINE) == [100] and second.difference("mean", "steps").mean == pytest.approx(25)


def test_steps_of_the_baseline_make_groups_of_their_own(costs):
    lines = [line(BASELINE, 0, [4, 4, 4, 4], steps=steps) for steps in (0, 10, 100)]
    lines += [line("mean", 0, [1, 1, 1, 1], steps=steps) for steps in (0, 11, 62)]
    groups = groups_of(lines, costs)
    assert [group.title.split(", ")[-1] for group in groups] == ["untrained", "10 steps of 32", "100 steps of 32"]
    for group, equal in zip(groups, ("steps", "time", "time"), strict=True):
        assert list(group.runs[equal]["mean"]) == [0] and group.difference("mean", equal).mean == pytest.approx(75)


def test_without_steps_the_untrained_models_are_searched(folder, tmp_path):
    variants = ["BToks, condensation 0.2", "unlabelled first", "condensation first"]
    study = Study(config(folder, steps=0, seeds=1, variants=variants, equal_time=False))
    study.log = Log(tmp_path / "runs.jsonl")
    study.run()
    assert {line["variant"] for line in study.log.lines} == {BASELINE, *variants}
    base = study.log.lines[0]
    rows = [json.loads(row) for row in (folder / "study" / "corpora" / "words-40" / "test.jsonl").open()]
    bare = prompted_model(str(folder / "backbone"), device="cpu", max_seq_length=64)
    words, meanings = (bare.encode([row[f"{side}_text"] for row in rows]) for side in ("query", "positive"))
    for scores, found in zip((words @ meanings.T, meanings @ words.T), base["ranks"].values(), strict=True):
        assert found == [int((row >= row[right]).sum()) for right, row in enumerate(scores)]
    assert base["loss"] == [] and "untrained" in study.write()


def test_variants_of_controls_reach_the_loss():
    assert Variant.parse(VARIANTS["further token"].variant).options["condensation_btoks"] == 4
