"""The study end to end on a tiny backbone: every stage, going on after a kill, what it refuses, and its table."""

from __future__ import annotations

import json
from dataclasses import asdict

import datasets
import numpy as np
import pytest

from recipes.study.__main__ import Study, StudyConfig
from recipes.study.arms import ARMS, BASELINE, HEADLINES
from recipes.study.report import groups_of, table
from recipes.study.runs import Log, Wanted, best_rate, equal_time_steps
from recipes.twins import Twin
from tests.backbones import build


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
    options = {"arms": ["BToks, term 0.2"], "corpora": ["words"], "tuning": "full", **defaults, **options}
    return StudyConfig(to=str(folder / "study"), backbones=[str(folder / "backbone")], **options)


def test_every_arm_is_one_that_can_be_built():
    assert BASELINE in HEADLINES and set(HEADLINES) <= set(ARMS)
    for name, arm in ARMS.items():
        assert arm.build(30).pooling in ("btok", "lasttoken", "mean"), name
    assert ARMS["term first"].build(30).options["condensation_warmup"] == 10
    assert ARMS["BToks, term 1"].term and not ARMS["BToks"].term and not ARMS["mean"].term


def test_runs_are_made_once_and_in_a_comparable_order(folder, capsys):
    """Two rates on validation, both seeds at the better one, then equal time; a second call makes nothing."""
    arms = ["BToks, term 0.2", "unlabelled first", "term first"]
    options = {"arms": arms, "rates": [1e-2, 1e-9], "rate_steps": 6}
    study = Study(config(folder, **options))
    study.run()
    printed = capsys.readouterr().out
    assert "0 runs are there, 16 are to be made" in printed  # four arms: two rates and two seeds each
    lines = [json.loads(line) for line in study.log.path.read_text().splitlines()]
    assert [line["split"] for line in lines[:8]] == ["validation"] * 8
    finals = [(line["arm"], line["seed"]) for line in lines[8:16]]
    assert finals == [
        (arm, seed) for seed in range(2) for arm in [BASELINE, "BToks, term 0.2", "term first", "unlabelled first"]
    ]
    for line in lines:
        assert all(np.isfinite(line["loss"])) and len(line["ranks"]) == 2 and line["seconds_a_step"] > 0
    chosen = {line["arm"]: line["rate"] for line in lines[8:16]}
    for arm in chosen:
        scores = {line["rate"]: line for line in lines[:8] if line["arm"] == arm}
        means = {
            rate: np.mean([1 / r for ranks in line["ranks"].values() for r in ranks]) for rate, line in scores.items()
        }
        assert means[chosen[arm]] == max(means.values())
    warm = next(line for line in lines[8:] if line["arm"] == "term first")
    assert warm["loss"][:2] == [0, 0] and min(warm["loss"][2:]) > 0 and len(warm["term"]) == 6
    after = next(line for line in lines[8:] if line["arm"] == "unlabelled first")
    assert len(after["loss"]) == 4 and after["steps"] == 6, "two steps are the first phase's"
    probed = next(line for line in lines[8:] if line["arm"] == "BToks, term 0.2")
    assert list(probed["conflict"]) == ["0", "1", "3", "5"] and probed["information"].keys() == {"own", "other"}
    # A torn line is made again, nothing else.
    whole = study.log.path.read_text()
    study.log.path.write_text(whole[: len(whole) - 20])
    Study(config(folder, **options)).run()
    again = [json.loads(line) for line in study.log.path.read_text().splitlines()]
    assert len(again) == len(lines)
    key = list(asdict(study.wanted("", "", "", 0)))
    assert [[line[k] for k in key] for line in again] == [[line[k] for k in key] for line in lines]
    text = Study(config(folder, **options)).write()
    assert "| BToks, term 0.2 | 2 |" in text and "saved by the own BToks" in text
    for name in ("study.md", "study.png", "curves.png"):
        assert (folder / "study" / name).stat().st_size > 300


def test_few_pairs_leave_the_rest_unlabelled(folder):
    corpus = Study(config(folder)).corpus("words@10")
    assert len(corpus.train["words"]) == 10 and len(corpus.unlabelled["words"]) == 14
    row = corpus.unlabelled["words"][0]
    assert row["query"] == row["positive"]
    seen = {str(row["positive"]) for row in corpus.train["words"]}
    assert not seen & {str(row["positive"]) for row in corpus.unlabelled["words"]}
    with pytest.raises(ValueError, match="asks for 100 pairs, but the corpus has 24"):
        Study(config(folder)).corpus("words@100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["x"]}, "arms must be of"),
        ({"corpora": ["x@3"]}, "corpora must be of"),
        ({"only": "x"}, "only must be"),
    ],
)
def test_what_cannot_run_is_refused_first(folder, options, message):
    with pytest.raises(ValueError, match=message):
        config(folder, **options)


def test_quick_is_the_headlines(folder):
    quick = StudyConfig(to=str(folder / "other"), quick=True)
    assert quick.arms == HEADLINES and quick.backbones == ["shipped"] and quick.seeds == 2


WANTED = Wanted("b", "words", BASELINE, 0, 1e-3, 100, 32, "test")


def line(arm, seed, ranks, seconds=1.0, steps=100, **other):
    run = asdict(WANTED) | {"arm": arm, "seed": seed, "steps": steps}
    return run | {
        "ranks": {"there": ranks[:2], "back": ranks[2:]},
        "seconds_a_step": seconds,
        "loss": [1.0] * 8,
        **other,
    }


def test_rates_and_equal_time_come_from_the_log(tmp_path):
    log = Log(tmp_path / "runs.jsonl")
    for rate, ranks in ((1e-3, [1, 2, 4, 4]), (1e-2, [1, 1, 4, 4])):
        assert best_rate(log, WANTED, [1e-3, 1e-2]) is None
        log.add(line(BASELINE, 0, ranks) | {"rate": rate})
    assert best_rate(log, WANTED, [1e-3, 1e-2]) == 1e-2
    assert best_rate(log, WANTED, [3.0]) == 3.0
    for arm, seconds in (("mean", 1.04), ("BToks", 1.6), ("K = 1", 0.8)):
        log.add(line(arm, 0, [1, 1, 1, 1], seconds))
    steps = {
        arm: equal_time_steps(log, Wanted(**asdict(WANTED) | {"arm": arm}), WANTED)
        for arm in ("mean", "BToks", "K = 1")
    }
    assert steps == {"mean": None, "BToks": 62, "K = 1": 125}


def test_the_table_says_what_the_lines_say():
    lines = [line(BASELINE, 0, [1, 2, 2, 4]), line(BASELINE, 1, [1, 2, 2, 2]), line("mean", 0, [1, 1, 1, 4], 1.5)]
    lines += [line("BToks", 0, [1, 1, 1, 1], 1.01), line("K = 1", 0, [1, 1, 1, 1], 2.0)]
    lines += [line("mean", 1, [1, 1, 1, 1], 1.7), line("mean", 0, [2, 2, 2, 4], 1.5, steps=60)]
    (group,) = groups_of(lines)
    assert group.scores(BASELINE) == pytest.approx([56.25, 62.5])
    assert group.difference("mean", "steps").mean == pytest.approx((25 + 37.5) / 2)
    assert group.difference("mean", "time").mean == pytest.approx(-12.5)  # seed 0 alone
    assert group.cost("mean") == pytest.approx(1.6)
    assert group.difference("BToks", "time") == group.difference("BToks", "steps"), "a step costs the same"
    assert group.difference("K = 1", "time") is None, "twice the cost, and not run for equal time"
    text = table([group])
    assert "| last token | 2 | 0.001 | 59.4 ± 3.1 |  |  | 1.00x |" in text
    assert "| mean | 2 | 0.001 | 90.6 ± 9.4 | +31.2 (" in text and "| -12.5 (" in text and "1.60x" in text


def test_twins_of_controls_reach_the_loss():
    assert Twin.parse(ARMS["further token"].twin).options["condensation_btoks"] == 4
