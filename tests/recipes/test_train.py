"""The training recipe end to end on a tiny Qwen2-VL: every source, resuming, adapters, presets, what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from recipes.data.mmeb_train_sources import MMEB_TRAIN
from recipes.train import check_flags
from recipes.training import run as recipe
from recipes.training.config import TrainConfig, parse
from recipes.training.presets import PRESETS
from recipes.training.run import train
from recipes.training.settings import trainer_flags
from recipes.training.validation import before_and_after
from tests.backbones import build
from tests.mmeb_train_files import jpeg, put, write_all

INPUTS = ["red kite", {"text": "what is it?"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("backbone")
    model, processor = build("qwen2_vl")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(24):
        put(folder / f"{i}.jpg", jpeg(i))
        negative = f"not {i}"
        rows.append({"query": f"find picture {i}", "positive_image": f"{i}.jpg", "negative": negative})
    rows[5]["positive_image"] = "missing.jpg"
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "mine.jsonl")


def config(backbone, tmp_path, **options) -> TrainConfig:
    defaults = {
        "backbone": backbone,
        "output_dir": str(tmp_path / "out"),
        "tuning": "full",
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "validation_size": 0,
    }
    return TrainConfig(**{**defaults, **options})


def weights(path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(path), device="cpu").state_dict()


def log_of(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def test_the_whole_mix_trains_and_says_what_it_skipped(backbone, tmp_path):
    written = write_all(tmp_path / "mix")
    # One batch of every source in turn.
    options = {"mmeb_root": str(tmp_path / "mix"), "mix": "round_robin", "max_steps": 25, "save_steps": 25}
    path = train(config(backbone, tmp_path, **options))
    model = SentenceTransformer(str(path), device="cpu")
    assert [type(module).__module__.split(".")[0] for module in model] == ["sentence_transformers"] * 4
    assert np.isfinite(model.encode(INPUTS)).all()
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert len(skipped) == sum(len(source.broken) for source in written.values())
    assert {"dataset", "index", "reason"} == set(skipped[0])
    card = (path / "README.md").read_text()
    assert "| visrag-indomain | 7 | 3 | 0 | 12 | query |" in card and "| WebQA | 7 | 3 | 0 | 0.5 | both |" in card
    assert "- `mix`: round_robin" in card and "BTokLoss" in card and "TIGER-Lab/MMEB-train" in card
    assert str(tmp_path) not in card, "a published card names no folder of this machine"
    log = [entry for entry in log_of(tmp_path / "out", 25) if "ranking" in entry]
    generated = [entry["condensation_tokens"] > 0 for entry in log]
    targets = [source.target for source in MMEB_TRAIN]
    assert generated == [target != "none" for target in targets], "CIRR and NIGHTS generate nothing"


def test_training_lowers_the_loss_and_scores_held_out_rows(backbone, pairs, tmp_path):
    options = {
        "data": [pairs],
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "validation_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 12,
        "save_steps": 24,
        "learning_rate": 3e-3,
    }
    path = train(config(backbone, tmp_path, **options))
    log = log_of(tmp_path / "out", 24)
    ranking = [entry["ranking"] for entry in log if "ranking" in entry]
    condensation = [entry["condensation"] for entry in log if "condensation" in entry]
    assert np.mean(ranking[-5:]) < 0.7 * np.mean(ranking[:3])
    assert np.mean(condensation[-5:]) < 0.7 * np.mean(condensation[:3])
    scores = [entry for entry in log if "eval_mine_cosine_ndcg@10" in entry]
    assert [entry["step"] for entry in scores] == [0, 12, 24], "a baseline before the first step"
    lines = [json.loads(line) for line in (tmp_path / "out/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 12, 24]
    for line, entry in zip(lines, scores, strict=True):
        for name in ("mine_cosine_ndcg@10", "mine-backwards_cosine_ndcg@10"):
            assert line[name] == entry[f"eval_{name}"]
    card = (path / "README.md").read_text()
    assert "ndcg@10" in card and "| mine | 24 | 1 | 2 | 23.0 | auto |" in card


@pytest.mark.parametrize("tuning", ["full", "dora"])
def test_a_resumed_run_ends_like_an_unbroken_one(backbone, pairs, tmp_path, tuning):
    options = {"data": [pairs], "tuning": tuning, "lora_dropout": 0.1, "warmup_steps": 1}
    whole = train(config(backbone, tmp_path / "whole", **options))
    first = config(backbone, tmp_path / "parts", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.SentenceTransformerTrainer, "get_batch_samples", stop_after(2))
        with pytest.raises(KeyboardInterrupt):
            train(first)
    with pytest.raises(ValueError, match="holds checkpoint-2. Pass --resume"):
        train(first)
    resumed = train(config(backbone, tmp_path / "parts", resume=True, **options))
    assert [entry["step"] for entry in log_of(tmp_path / "parts" / "out", 4) if "ranking" in entry] == [1, 2, 3, 4]
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected), "bit for bit"
    untrained = weights(
        recipe.build_model(backbone, device="cpu").save_pretrained(str(tmp_path / "u")) or tmp_path / "u"
    )
    assert any(not torch.equal(expected[key], untrained[key]) for key in expected)
    if tuning != "full":
        assert not (resumed / "adapter_config.json").exists(), "merged: plain weights"


def stop_after(steps):
    get = recipe.SentenceTransformerTrainer.get_batch_samples

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == steps:
            raise KeyboardInterrupt
        return get(self, *args, **kwargs)

    return interrupted


def test_cached_loss_targets_and_negatives(backbone, pairs, tmp_path):
    seen = []

    class Watch(recipe.CachedBTokLoss):
        def forward(self, sentence_features, labels=None):
            columns = list(sentence_features)
            seen.append(len(columns))
            return super().forward(columns, labels)

    options = {"data": [pairs], "mini_batch_size": 1, "target": "query", "max_steps": 2, "distinct": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "CachedBTokLoss", Watch)
        train(config(backbone, tmp_path / "a", **options))
        train(config(backbone, tmp_path / "b", hard_negatives="none", **options))
        # Rows that start as the end of a turn: untrained ones that start as a line break find all texts alike.
        recipe.build_model(backbone, init="eos", device="cpu").save_pretrained(str(tmp_path / "miner"))
        miner = {"hard_negatives": "mine", "miner": str(tmp_path / "miner"), "num_negatives": 2}
        train(config(backbone, tmp_path / "c", mix="proportional", **miner, **options))
    assert seen == [3, 3, 2, 2, 4, 4]


def test_too_few_rows_to_hold_some_out_train_without_scores(backbone, tmp_path, caplog):
    lines = [json.dumps({"query": f"question {number}", "positive": f"answer {number}"}) for number in range(5)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    options = {"data": [str(tmp_path / "few.jsonl")], "validation_size": 200}
    path = train(config(backbone, tmp_path, **options))
    assert (path / "modules.json").is_file() and "few has no validation part" in caplog.text
    assert not (tmp_path / "out" / "validation.jsonl").exists()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "resume": True}
    with pytest.raises(ValueError, match="needs held-out rows, but no data set has enough. Leave it out"):
        train(config(backbone, tmp_path, **options, **best))


def test_prompts_that_differ_by_data_set_are_trained_with_and_scored_with(backbone, tmp_path, monkeypatch):
    for name in ("a", "b"):
        lines = [json.dumps({"query": f"{name} question {i}", "positive": f"{name} answer {i}"}) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {"data": [str(tmp_path / f"{name}.jsonl") for name in "ab"], "validation_size": 3}
    given = {"a": {"query": "ask a: "}, "b": {"query": "ask b: ", "positive": "read: "}}
    read = config(backbone, tmp_path, prompts=given, **data)
    parts = recipe.validation(read, recipe.checked(read).held_out).evaluators[0].evaluators
    found = {part.name: (part.query_prompt, part.corpus_prompt) for part in parts}
    assert found["a"] == ("ask a: ", "") and found["b"] == ("ask b: ", "read: ")
    assert found["a-backwards"] == ("", "ask a: ") and found["b-backwards"] == ("read: ", "ask b: ")
    one = config(backbone, tmp_path, prompts={"a": {"query": "ask a: "}}, **data)
    saved = recipe.build(one, recipe.checked(one).training).prompts
    assert saved["a-query"] == "ask a: " and not saved.get("query"), "b trains without"
    for prompts in ({"qery": "find "}, {"a": {"qery": "find "}}, {"c": {"query": "find "}}):
        wrong = next(key for key in ("qery", "c") if key in str(prompts))
        with pytest.raises(ValueError, match=f"must name data sets or columns, but \\['{wrong}'\\] are none"):
            train(config("not a model", tmp_path, prompts=prompts, **data))


def test_adapters_over_a_half_precision_base_train_in_float32(backbone, tmp_path):
    model = recipe.build(config(backbone, tmp_path, dtype="bfloat16", tuning="dora"), [])
    types = {trained: {p.dtype for p in model.parameters() if p.requires_grad == trained} for trained in (True, False)}
    assert types[True] == {torch.float32} and torch.bfloat16 in types[False]


def test_a_base_that_was_half_written_is_written_again(backbone, tmp_path):
    """Killed before the first checkpoint: what lies there is no base that an adapter may stand on."""
    torn = tmp_path / "out" / "base"
    torn.mkdir(parents=True)
    (torn / "config.json").write_text("{")
    recipe.build(config(backbone, tmp_path, tuning="lora", resume=True), [])
    assert (torn / "modules.json").is_file() and json.loads((torn / "config.json").read_text())


def test_what_can_be_known_from_the_data_is_said_before_anything_is_saved(backbone, pairs, tmp_path):
    with pytest.raises(ValueError, match="at least one batch of --batch_size 64 rows .*'mine': 23}"):
        train(config("not a model", tmp_path, data=[pairs], per_device_train_batch_size=64))
    texts, processor = build("qwen3")
    texts.save_pretrained(tmp_path / "texts")
    processor.save_pretrained(tmp_path / "texts")
    with pytest.raises(ValueError, match="mine holds image inputs, but the backbone .*texts reads text only"):
        train(config(str(tmp_path / "texts"), tmp_path, data=[pairs], tuning="lora"))
    assert not (tmp_path / "out" / "base").exists()


def test_broken_rows_can_be_an_error_before_the_model_is_built(pairs, tmp_path):
    with pytest.raises(ValueError, match="mine: 1 of 24 rows are broken:\n  row 5: positive: file"):
        train(config("not a model", tmp_path, data=[pairs], on_error="raise"))


def test_wrong_settings_are_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        train(config(backbone, tmp_path))
    with pytest.raises(ValueError, match="pass --backbone or --preset"):
        train(config("", tmp_path))
    with pytest.raises(ValueError, match="tuning must be one of"):
        config(backbone, tmp_path, tuning="qlora")
    with pytest.raises(ValueError, match="needs --miner"):
        config(backbone, tmp_path, hard_negatives="mine")


def test_own_pairs_beside_the_mix_need_their_shares(backbone, tmp_path, capsys):
    """By rows, 5,000 own pairs would be 99 % of all batches."""
    both = {"mmeb_root": str(tmp_path), "data": ["mine.jsonl"]}
    with pytest.raises(ValueError, match="--data beside --mmeb_root needs --data_weights"):
        config(backbone, tmp_path, **both)
    for more in ({"data_weights": [5.0]}, {"mix": "proportional"}):
        config(backbone, tmp_path, **both, **more)
    with pytest.raises(SystemExit):
        check_flags(["--backbone", "x", "--output_dir", "out", "--mmeb_root", "a", "--data", "b"])
    assert "--data_weights 5" in capsys.readouterr().err


def test_the_command_line_wins_over_the_preset_and_the_preset_over_defaults(tmp_path):
    given = ["--output_dir", str(tmp_path), "--use_cpu", "--preset", "qwen2-vl-2b"]
    preset = parse(given)
    assert preset.backbone == "Qwen/Qwen2-VL-2B-Instruct" and preset.learning_rate == 5e-5
    assert (preset.tuning, preset.lora_r, preset.lora_alpha, preset.num_btoks) == ("dora", 16, 32, 4)
    assert (preset.condensation_weight, preset.condensation_steps, preset.max_steps) == (5.0, 2000, 5000)
    assert (preset.per_device_train_batch_size, preset.block_size, preset.mini_batch_size) == (128, 512, 8)
    changed = parse([*given, "--learning_rate", "1e-4", "--bf16", "False", "--tuning", "full", "--data", "a", "b"])
    assert (changed.learning_rate, changed.bf16, changed.tuning, changed.data) == (1e-4, False, "full", ["a", "b"])
    assert changed.block_size == 512
    plain = parse(["--output_dir", str(tmp_path), "--use_cpu"])
    lengths = [(preset.max_steps, preset.num_train_epochs)]
    for more in (
        ["--num_train_epochs", "2"],
        ["--num_train_epochs", "3"],
        ["--num_train_epochs", "2", "--max_steps", "7"],
    ):
        longer = parse([*given, *more])
        lengths.append((longer.max_steps, longer.num_train_epochs))
    assert lengths == [(5000, 3), (-1, 2), (-1, 3), (7, 2)] and plain.max_steps == -1
    assert (plain.per_device_train_batch_size, plain.mini_batch_size, plain.logging_steps) == (64, 8, 10)
    assert plain.tuning == "lora" and plain.block_size == 0
    with pytest.raises(SystemExit):
        check_flags([*given[:-1], "qwen9"])


def test_presets_name_settings_that_exist():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    for preset in PRESETS.values():
        assert set(preset) <= names
        assert preset["block_size"] % preset["per_device_train_batch_size"] == 0
    assert PRESETS["qwen3-vl-2b"]["backbone"] == "Qwen/Qwen3-VL-2B-Instruct"
    # The authors' files: the condensation loss is on for the whole run in those of v2 and of the expanded mixes only.
    whole_run = {name for name, preset in PRESETS.items() if preset["condensation_steps"] == preset["max_steps"]}
    assert whole_run == {"qwen2-vl-2b-v2"} | {name for name in PRESETS if "expanded" in name} and len(whole_run) == 4
    assert {name for name, preset in PRESETS.items() if preset["readout"] == "attention"} == {"qwen2-vl-2b-v2"}
    gme = PRESETS["gme-qwen2-vl-2b"]
    assert gme["condensation_weight"] == 0.1 and gme["scale"] == pytest.approx(33.3, abs=0.1)


def test_the_best_checkpoint_by_the_held_out_score_becomes_the_model(backbone, pairs, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "validation_size": 2}
    path = train(config(backbone, tmp_path, data=[pairs], max_steps=6, learning_rate=0.1, **options))
    state = json.loads((tmp_path / "out/checkpoint-6/trainer_state.json").read_text())
    scores = {row["step"]: row["eval_sequential_score"] for row in state["log_history"] if "eval_runtime" in row}
    best = max((step for step in scores if step), key=lambda step: scores[step])
    assert state["best_metric"] == scores[best] and state["best_global_step"] == best
    lines = [json.loads(line) for line in (tmp_path / "out/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("saved")] == [best]
    assert f"(step 0) → after (step {best})" in before_and_after(tmp_path / "out/validation.jsonl")
    kept, model = weights(tmp_path / "out" / f"checkpoint-{best}"), weights(path)
    assert all(torch.equal(kept[name], value) for name, value in model.items())
    with pytest.raises(ValueError, match="load_best_model_at_end needs --validation_size"):
        config(backbone, tmp_path, **{**options, "validation_size": 0})


def test_prompts_reach_the_model():
    def prompts(given, sources=()):
        return TrainConfig(output_dir="out", use_cpu=True, report_to=[], prompts=given).model_prompts(sources)

    assert prompts(None) == {} and prompts("find: ") == {"query": "find: ", "document": "find: "}
    assert prompts('{"query": "find: ", "positive": "page: "}') == {"query": "find: ", "document": "page: "}
    same = {"a": {"query": "find: ", "positive": "page: "}, "b": {"query": "find: ", "positive": "text: "}}
    assert prompts(same) == {"a-document": "page: ", "b-document": "text: ", "query": "find: "}
    for given in ({"negative": "N: ", "positive": "P: "}, {"positive": "P: ", "negative": "N: "}):
        assert prompts(given) == {"document": "P: "}, "positives, whatever stands first"
    assert prompts({"negative": "N: ", "query": "Q: "}) == {"query": "Q: "}, "positives train without"
    assert prompts({"a": {"query": "A: "}}, ["a", "b"]) == {"a-query": "A: "}, "b trains without"
    assert prompts({"a": {"query": "A: "}}, ["a"]) == {"query": "A: "}
    assert prompts({"a": "X: "}, ["a"]) == {"query": "X: ", "document": "X: "}
    assert prompts({"a": {"query": "A: "}, "query": "A: "}, ["a", "b"]) == {"query": "A: "}


def test_help_shows_our_settings_first_and_every_argument_of_the_trainer(capsys):
    with pytest.raises(SystemExit):
        check_flags(["--help"])
    shown = capsys.readouterr().out
    places = [shown.index(f"\n{name}:\n") for name in ("run", "data", "model", "loss")]
    assert places == sorted(places) and places[-1] < shown.index("training arguments of sentence-transformers")
    assert shown.index("--condensation_weight") < shown.index("--weight_decay")
    names = {field.name for field in dataclasses.fields(TrainConfig) if field.init}
    assert trainer_flags().keys() <= names, "read from the sources, and nothing that is no argument"
    assert all(f"--{name}" in shown for name in names)


def test_a_model_is_saved_with_its_prompts_and_says_how_many_pairs_mining_lost(backbone, pairs, tmp_path, caplog):
    options = {"data": [pairs], "max_steps": 1, "prompts": {"query": "find: ", "positive": ""}, "save_steps": 1}
    path = train(config(backbone, tmp_path / "a", **options))
    assert SentenceTransformer(str(path), device="cpu").prompts == {"query": "find: ", "document": ""}
    miner = {"hard_negatives": "mine", "miner": str(path), "num_negatives": 30}
    with pytest.raises(ValueError, match="no pair has 30 negatives"):
        train(config(backbone, tmp_path / "b", **miner, **options))
    assert "mine: 23 of 23 pairs are left out, because fewer than 30" in caplog.text


def test_ctrl_c_saves_a_checkpoint_says_how_to_go_on_and_resuming_ends_like_an_unbroken_run(
    backbone, pairs, tmp_path, monkeypatch
):
    options = {"data": [pairs], "warmup_steps": 1, "save_steps": 100}
    whole = train(config(backbone, tmp_path / "whole", **options))
    get = recipe.SentenceTransformerTrainer.get_batch_samples

    def press(self, *args, **kwargs):
        if self.state.global_step == 1:  # in the second step
            os.kill(os.getpid(), signal.SIGINT)
        return get(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.SentenceTransformerTrainer, "get_batch_samples", press)
        with pytest.raises(KeyboardInterrupt, match="up to .*checkpoint-2 is saved. The same command with --resume"):
            train(config(backbone, tmp_path / "parts", **options))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = weights(train(config(backbone, tmp_path / "parts", resume=True, **options)))
    expected = weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in resumed.items()), "bit for bit"


def test_scores_of_an_earlier_training_are_not_shown_for_this_one(backbone, pairs, tmp_path):
    options = {"data": [pairs], "max_steps": 1, "save_strategy": "no"}
    train(config(backbone, tmp_path, validation_size=2, **options))
    assert (tmp_path / "out/validation.jsonl").is_file()
    train(config(backbone, tmp_path, **options))
    assert not (tmp_path / "out/validation.jsonl").exists()


def test_the_scores_shown_are_those_of_the_saved_model(backbone, pairs, tmp_path, monkeypatch):
    """The best checkpoint is that of step 2, which is loaded after step 5."""
    scores = [0.1, 0.9, 0.4, 0.3]

    class Known(BaseEvaluator):
        def __call__(self, *args, **kwargs):
            return {"sequential_score": scores.pop(0)}

    monkeypatch.setattr(recipe, "validation", lambda *args: Known())
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "validation_size": 2}
    train(config(backbone, tmp_path, data=[pairs], max_steps=5, **best))
    lines = [json.loads(line) for line in (tmp_path / "out/validation.jsonl").read_text().splitlines()]
    shown = [(line["step"], line["sequential_score"], line.get("saved", False)) for line in lines]
    assert shown == [(0, 0.1, False), (2, 0.9, True), (4, 0.4, False), (5, 0.3, False)] and not scores
    text = before_and_after(tmp_path / "out/validation.jsonl")
    assert "after (step 2)" in text and "10.0 → 90.0" in text


def test_scores_before_and_after(tmp_path):
    names = {"mine_cosine_ndcg@10": 0.1, "mine_cosine_mrr@10": 0.2, "mine_cosine_accuracy@1": 0.0}
    after = dict.fromkeys(names, 0.5)
    lines = [{"step": 0, **names}, {"step": 3, **names}, {"step": 6, **after}]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = before_and_after(tmp_path / "v.jsonl")
    assert "Before (step 0) → after (step 6), in %" in text
    assert "| mine: query → positive | 10.0 → 50.0 | 20.0 → 50.0 | 0.0 → 50.0 |" in text
