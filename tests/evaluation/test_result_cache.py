"""Results are whole or not there, and a torn one costs its own data set and nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import mteb
import pytest
from mteb.results import TaskResult

from evaluation.atomic_write import atomic_write
from evaluation.mini import mini_benchmark
from evaluation.report import RUN_FILE, read_runs
from evaluation.reporting.scores import read_results
from evaluation.result_cache import WholeResultCache
from evaluation.run import parse
from evaluation.scoring import record_run


@pytest.fixture
def score(tmp_path, random_encoder):
    """score(group) -> file of a result of the mini benchmark, written through the cache."""

    def run(group="I-VG"):
        task = mini_benchmark("test", groups=[group]).tasks[0]
        task.load_data()
        encoder = random_encoder(task.dataset["default"]["test"], 0)
        options = {"cache": WholeResultCache(tmp_path), "co2_tracker": False, "show_progress_bar": False}
        mteb.evaluate(encoder, task, **options)
        return next(tmp_path.rglob(f"{task.metadata.name}.json"))

    return run


def test_results_and_settings_are_what_mteb_writes(score, tmp_path):
    file = score()
    assert TaskResult.from_disk(file).task_name == file.stem
    score("V-CLS")
    settings = [json.loads(line)["task"] for line in (file.parent / "run_settings.jsonl").read_text().splitlines()]
    assert sorted(settings) == sorted(path.stem for path in file.parent.glob("mini-1.*.json"))
    assert json.loads((file.parent / "model_meta.json").read_text())["name"] == "test/table"
    assert not list(tmp_path.glob(".saving-*"))


def test_a_save_that_is_cut_short_leaves_the_old_result_or_none(score, tmp_path, monkeypatch):
    def full(self, path):
        path.write_text('{"task_name": "mini')
        raise OSError("no space left on device")

    monkeypatch.setattr(TaskResult, "to_disk", full)
    with pytest.raises(OSError, match="no space"):
        score()
    assert not list(tmp_path.rglob("mini-1*.json"))
    monkeypatch.undo()
    assert score().is_file()


def test_a_torn_result_is_set_aside_and_scored_again(score, tmp_path, caplog):
    file = score()
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        assert score() == file
    assert f"{file} was torn" in caplog.text and "made again" in caplog.text
    ours, theirs = json.loads(file.read_text()), json.loads(whole)
    assert ours["scores"] == theirs["scores"]
    assert file.with_name(f"{file.name}.torn").read_text() == whole[: len(whole) // 2]


def test_a_report_leaves_torn_results_out(score, tmp_path, caplog):
    file = score()
    score("V-CLS")
    file.write_text(file.read_text()[:-20])
    (file.parent / "model_meta.json").write_text("{")
    [model] = read_results([tmp_path])
    assert list(model.scores) == ["mini-V-CLS"] and "was torn" in caplog.text


def test_a_torn_record_of_runs_starts_anew(tmp_path, caplog):
    options = parse(["--model", "x"])
    record_run(tmp_path, "first", options)
    (tmp_path / RUN_FILE).write_text((tmp_path / RUN_FILE).read_text()[:-5])
    record_run(tmp_path, "second", options)
    assert [run["command"] for run in read_runs([tmp_path])] == ["second"]
    assert (tmp_path / f"{RUN_FILE}.torn").is_file() and "was torn" in caplog.text


def test_a_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    atomic_write(file, "old")

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            atomic_write(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["run.json"]
