"""Restarting a training: torn checkpoints, another training's folder, two trainings in one folder, a real kill."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from recipes.data.user_data import load_user_data
from recipes.training.config import TrainConfig
from recipes.training.resume import (
    LOCK,
    RECORD,
    check_fingerprint,
    newest_complete,
    only_training_in,
    run_fingerprint,
    what_is_torn,
    write_fingerprint,
)
from recipes.training.run import begin, checked, train
from st_btok import build_model
from tests.backbones import build
from tests.mmeb_train_files import jpeg, put


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in which the Trainer itself left checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("run")
    backbone, tokenizer = build("llama")
    model = build_model(backbone, processor=tokenizer, device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"query": list("abcd"), "positive": ["one", "two", "three", "four"]})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    return folder


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_newest_whole_checkpoint_is_taken_in_silence(run, caplog):
    assert newest_complete(run) == run / "checkpoint-2" and not caplog.records
    assert newest_complete(run / "nothing here") is None


def test_every_file_of_state_cut_at_any_place_is_noticed(run, caplog):
    """Whatever the Trainer wrote that decides how training goes on, cut to nothing, in the middle, by one byte."""
    last = run / "checkpoint-2"
    deciding = [name for name in files(last) if name.endswith((".json", ".safetensors", ".pt", ".pth", ".bin"))]
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"} <= set(
        deciding
    )
    for name in deciding:
        whole = (last / name).read_bytes()
        # The last byte of a text file is its newline, without which it is as good.
        cuts = [0, len(whole) // 2, len(whole) - (2 if name.endswith(".json") else 1)]
        for size in cuts:
            (last / name).write_bytes(whole[:size])
            with caplog.at_level(logging.WARNING):
                assert newest_complete(run) == run / "checkpoint-1", (name, size)
            assert "checkpoint-2 is passed over" in caplog.text and name in caplog.text
            caplog.clear()
        (last / name).write_bytes(whole)
    assert newest_complete(run) == last


def test_missing_state_and_damage_in_the_middle_are_noticed(run):
    last = run / "checkpoint-2"
    missing = {"trainer_state.json": "written last", "optimizer.pt": "no optimizer", "model.safetensors": "no weights"}
    for name, said in missing.items():
        shutil.move(last / name, run / "aside")
        assert said in what_is_torn(last, 2)
        shutil.move(run / "aside", last / name)
    content = bytearray((last / "optimizer.pt").read_bytes())
    place = len(content) // 2
    content[place : place + 64] = bytes(64)
    (last / "optimizer.pt").write_bytes(content)
    assert "optimizer.pt is damaged in" in what_is_torn(last, 2)


def test_no_whole_checkpoint_is_none(run):
    for number in (1, 2):
        (run / f"checkpoint-{number}" / "trainer_state.json").unlink()
    assert newest_complete(run) is None


def pairs(path, texts=("one", "two", "three")):
    path.mkdir(exist_ok=True)
    rows = [{"query": f"find {text}", "positive": text} for text in texts]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_user_data([str(path / "pairs.jsonl")])


def test_another_training_is_refused_and_moved_files_are_not_another(tmp_path, caplog):
    backbone, tokenizer = build("llama")
    for name in ("backbone", "moved"):
        backbone.save_pretrained(tmp_path / name)
    settings = {"seed": 1, "num_btoks": 4}
    first = run_fingerprint(pairs(tmp_path / "a"), str(tmp_path / "backbone"), settings)
    write_fingerprint(tmp_path / "out", first)
    check_fingerprint(tmp_path / "out", run_fingerprint(pairs(tmp_path / "b"), str(tmp_path / "moved"), settings))
    changed = {
        "data": run_fingerprint(pairs(tmp_path / "c", ("one", "two", "four")), str(tmp_path / "backbone"), settings),
        "seed": {**first, "seed": 2},
    }
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    backbone.save_pretrained(tmp_path / "backbone")
    changed["backbone"] = run_fingerprint(pairs(tmp_path / "a"), str(tmp_path / "backbone"), settings)
    for name, identity in changed.items():
        with pytest.raises(ValueError, match=f"this differs from .*training.json:\n  {name}: .* before, .* now"):
            check_fingerprint(tmp_path / "out", identity)
    check_fingerprint(tmp_path, first)
    assert "can't be checked" in caplog.text


def test_a_folder_that_cannot_be_written_is_said_to_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match="output_dir must be a folder that can be written, but .*file/out' can't: Not a"
    ):
        with only_training_in(tmp_path / "file" / "out"):
            pass


def hold(folder, pids):
    with only_training_in(folder):
        worker = os.fork()
        if not worker:  # as a data loader's worker, which outlives a killed training for a while
            time.sleep(60)
            os._exit(0)
        pids.send(worker)
        time.sleep(60)


def test_a_second_training_is_refused_until_the_first_dies_even_with_a_worker_left_behind(tmp_path):
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, there))
    holder.start()
    worker = here.recv()
    try:
        with pytest.raises(RuntimeError, match=f"another training runs in .* \\(process {holder.pid}\\)"):
            with only_training_in(tmp_path):
                raise AssertionError("entered")
        holder.kill()
        holder.join()
        os.kill(worker, 0)  # still there
        with only_training_in(tmp_path):
            assert (tmp_path / LOCK).read_text() == str(os.getpid())
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.kill()


def settings(folder, out, resume=False):
    return TrainConfig(
        backbone=str(folder / "backbone"),
        data=[str(folder / "pairs.jsonl")],
        output_dir=str(folder / out),
        resume=resume,
        tuning="full",
        max_steps=6,
        save_steps=1,
        per_device_train_batch_size=2,
        validation_size=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


CHILD = """
import sys
from pathlib import Path
from recipes.training.run import begin, checked, train
from tests.recipes.training.test_resume import settings
train(settings(Path(sys.argv[1]), "out"))
"""


@pytest.mark.slow
def test_a_killed_training_with_a_torn_checkpoint_ends_like_an_unbroken_one(tmp_path, caplog):
    """SIGKILL in the middle, the newest checkpoint cut in half: resuming takes the one before, bit by bit."""
    backbone, processor = build("qwen2_vl")
    backbone.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    pairs(tmp_path, [f"text {i}" for i in range(12)])
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stderr=subprocess.DEVNULL)
    while not (tmp_path / "out/checkpoint-3/trainer_state.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = newest / "model.safetensors"
    if weights.exists():
        weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="this differs from .*\n  seed: 42 before, 7 now"):
        train(dataclasses.replace(settings(tmp_path, "out", resume=True), seed=7))
    resumed = train(settings(tmp_path, "out", resume=True))
    assert f"{newest.name} is passed over: " in caplog.text
    whole = train(settings(tmp_path, "whole"))
    resumed, whole = (SentenceTransformer(str(path), device="cpu").state_dict() for path in (resumed, whole))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


CHANGES = {
    "lora_alpha": 64,
    "lora_dropout": 0.5,
    "prompts": {"query": "find: "},
    "data_weights": [9.0, 1.0],
    "dtype": "bfloat16",
    "scale": 1.0,
    "condensation_weight": 3.0,
    "condensation_steps": 10,
    "target": "query",
    "max_target_tokens": 8,
    "route": "prefix",
    "false_negative_margin": 0.1,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 3,
    "weight_decay": 0.5,
    "max_grad_norm": 9.0,
}


def begun(folder, sources, monkeypatch, **options):
    """What `begin` says to a folder with a whole checkpoint."""
    monkeypatch.setattr("recipes.training.run.newest_complete", lambda folder: Path(folder))
    given = {"tuning": "lora", **options}
    return begin(dataclasses.replace(settings(folder, "out", resume=True), **given), sources, {})


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_decides_what_is_learned_must_be_the_same(tmp_path, monkeypatch, name):
    sources = pairs(tmp_path)
    (tmp_path / "out").mkdir()
    begun(tmp_path, sources, monkeypatch)
    begun(tmp_path, sources, monkeypatch, max_steps=100, mini_batch_size=2)
    with pytest.raises(ValueError, match=f"training.json:\n  {name}: .* before, .* now"):
        begun(tmp_path, sources, monkeypatch, **{name: CHANGES[name]})
    begun(tmp_path, sources, monkeypatch, allow_changes=True, **{name: CHANGES[name]})


def test_the_order_of_the_data_must_be_the_same(tmp_path, monkeypatch):
    first, second = pairs(tmp_path / "a")[0], pairs(tmp_path / "b", ("four", "five"))[0]
    first, second = dataclasses.replace(first, name="a"), dataclasses.replace(second, name="b")
    begun(tmp_path, [first, second], monkeypatch)
    with pytest.raises(ValueError, match=r"order of data: \['a', 'b'\] before, \['b', 'a'\] now"):
        begun(tmp_path, [second, first], monkeypatch)


def test_a_record_of_an_older_version_resumes_and_is_completed(tmp_path, monkeypatch):
    sources = pairs(tmp_path)
    begun(tmp_path, sources, monkeypatch)
    record = tmp_path / "out" / RECORD
    whole = json.loads(record.read_text())
    old = {name: value for name, value in whole.items() if name not in {*CHANGES, "order of data", "instructions"}}
    record.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="seed: 42 before, 7 now"):
        begun(tmp_path, sources, monkeypatch, seed=7)
    begun(tmp_path, sources, monkeypatch, scale=1.0)
    assert json.loads(record.read_text()) == {**whole, "scale": 1.0}


def test_pictures_that_changed_under_their_name_are_read_again(tmp_path, monkeypatch):
    for i in range(4):
        put(tmp_path / f"{i}.jpg", jpeg(i))
    rows = [{"query": f"find {i}", "positive_image": f"{i}.jpg"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(tmp_path, "out", resume=True)
    begun(tmp_path, checked(config).training, monkeypatch)
    begun(tmp_path, checked(config).training, monkeypatch)
    put(tmp_path / "2.jpg", jpeg(9))
    with pytest.raises(ValueError, match="data: .* before, .* now"):
        begun(tmp_path, checked(config).training, monkeypatch)
