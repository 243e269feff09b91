"""`BTokCallback`: the step reaches the losses, what they measure reaches the log; loops without a Trainer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers.trainer import DEFAULT_CALLBACKS

from st_btok import BTokCallback, BTokLoss, CachedBTokLoss

DATA = Dataset.from_dict({"query": ["a", "b", "c", "d"] * 4, "positive": ["red", "blue", "green", "grey"] * 4})


def trainer(model, folder, loss, callbacks=None, **options):
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 5e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return SentenceTransformerTrainer(
        model=model, args=SentenceTransformerTrainingArguments(**{**defaults, **options}), train_dataset=DATA,
        eval_dataset=DATA, loss=loss, callbacks=[BTokCallback()] if callbacks is None else callbacks,
    )  # fmt: skip


def logged(trained, name="condensation_weight"):
    return [entry[name] for entry in trained.state.log_history if "ranking" in entry]


def scheduled(model, kind=BTokLoss):
    return kind(model, condensation_weight=5.0, condensation_steps=2)


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
@pytest.mark.parametrize("made_by", ["the user", "the Trainer"])
def test_the_schedule_follows_the_optimizer_steps(qwen, tmp_path, kind, made_by):
    """Two batches an update: the condensation loss must be on for 2 updates (4 batches), whoever makes the loss."""
    loss = scheduled(qwen, kind) if made_by == "the user" else lambda model: scheduled(model, kind)
    trained = trainer(qwen, tmp_path, loss, gradient_accumulation_steps=2)
    trained.train()
    assert logged(trained) == [5.0, 5.0, 0.0, 0.0]
    assert all(value > 0 for value in logged(trained, "condensation")[:2]) and logged(trained, "condensation")[2] == 0


def test_resuming_continues_the_schedule(qwen, tmp_path):
    start, options = copy.deepcopy(qwen), {"save_strategy": "steps", "save_steps": 1}
    trainer(qwen, tmp_path, scheduled(qwen), **options).train()
    resumed = trainer(start, tmp_path, scheduled(start), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(resumed) == [5.0, 5.0, 0.0, 0.0]
    np.testing.assert_allclose(start.encode(["red"]), qwen.encode(["red"]), atol=1e-6)


def test_without_the_callback_a_schedule_is_an_error_and_a_constant_is_not(qwen, tmp_path):
    before = list(DEFAULT_CALLBACKS)
    with pytest.raises(ValueError, match="the loss was told none"):
        trainer(qwen, tmp_path, scheduled(qwen), callbacks=[]).train()
    trained = trainer(qwen, tmp_path, BTokLoss(qwen), callbacks=[], max_steps=1)
    trained.train()
    assert "condensation_weight" not in trained.state.log_history[0] and logged(trained, "condensation")[0] > 0
    assert before == DEFAULT_CALLBACKS, "nothing is registered for other Trainers"


def test_the_step_of_a_finished_training_is_not_handed_on(qwen, tmp_path):
    trainer(qwen, tmp_path, scheduled(qwen)).train()
    with pytest.raises(ValueError, match="the loss was told none"):
        trainer(qwen, tmp_path, scheduled(qwen), callbacks=[]).train()


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_what_is_logged(qwen, tmp_path, kind):
    """Parts that sum to the loss, and the condensation loss in nats; later callbacks see them too."""
    loss = kind(qwen, condensation_weight=0.5)
    trained = trainer(qwen, tmp_path, loss, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2)
    trained.train()
    first = next(entry for entry in trained.state.log_history if "ranking" in entry)
    assert first["loss"] == pytest.approx(first["ranking"] + first["condensation"], rel=1e-3)
    assert first["condensation"] == pytest.approx(0.5 * first["condensation_nll"], rel=1e-2)
    assert first["condensation_weight"] == 0.5 and first["condensation_leak"] == 0 and first["tokens_per_second"] > 0
    assert 16 <= first["condensation_tokens"] <= 24, "4 words of 3 to 5 letters, each with an end-of-turn token"
    evaluated = next(entry for entry in trained.state.log_history if "eval_loss" in entry)
    assert evaluated["eval_condensation"] == pytest.approx(0.5 * evaluated["eval_condensation_nll"], rel=1e-2)


def test_evaluation_before_training(qwen, tmp_path):
    """The weight is that of step 0."""
    found = trainer(qwen, tmp_path, scheduled(qwen))
    found.evaluate()
    assert found.state.log_history[0]["eval_condensation_weight"] == 5.0


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_evaluation_after_training(qwen, tmp_path, kind):
    """With the step that training ended at; another training is not given it (see above)."""
    trained = trainer(qwen, tmp_path, scheduled(qwen, kind))
    trained.train()
    trained.evaluate()
    found = trained.state.log_history[-1]
    assert found["eval_condensation_weight"] == 0 and found["eval_ranking"] == pytest.approx(
        found["eval_loss"], abs=1e-3
    )


def test_each_evaluation_set_is_logged_by_itself(qwen, tmp_path):
    """Not under one name, and not as means over the sets and evaluations before."""
    # Each of one batch: the Trainer draws the rows of batches in an order of its own.
    sets = {
        "colours": DATA.select(range(8)),
        "none": Dataset.from_dict({"query": ["a", "b"] * 2, "positive": ["", ""] * 2}),
    }
    trained = trainer(qwen, tmp_path, BTokLoss(qwen, condensation_weight=0.5), max_steps=1)
    trained.train()
    alone = {}
    for name, rows in sets.items():
        with torch.no_grad():
            loss = BTokLoss(qwen.eval(), condensation_weight=0.5)
            alone[name] = loss([qwen.preprocess(rows[column]) for column in ("query", "positive")])
    for _ in range(2):
        trained.evaluate(eval_dataset=sets)
        logs = {key: value for entry in trained.state.log_history[-2:] for key, value in entry.items()}
        for name, parts in alone.items():
            for part, value in parts.items():
                assert logs[f"eval_{name}_{part}"] == pytest.approx(value.item(), abs=1e-3)
            assert logs[f"eval_{name}_loss"] == pytest.approx(sum(parts.values()).item(), abs=1e-3)
        assert logs["eval_colours_condensation_nll"] > 0 and "eval_none_condensation_nll" not in logs
    trained.evaluate(eval_dataset=sets["colours"])
    found = trained.state.log_history[-1]
    assert found["eval_ranking"] == pytest.approx(alone["colours"]["ranking"].item(), abs=1e-3)


def test_a_loss_modifier_reports_once(qwen, tmp_path):
    loss = BTokLoss(qwen)
    trained = trainer(qwen, tmp_path, MatryoshkaLoss(qwen, loss, [32, 16, 8]), max_steps=1)
    trained.train()
    entry = next(entry for entry in trained.state.log_history if "loss" in entry)
    assert entry["condensation_nll"] > 0 and entry["condensation_weight"] == 0.2
    assert entry["condensation_tokens"] >= 16


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_a_loop_of_ones_own(qwen, kind):
    """The line of the docstrings; with a schedule, the step is set by hand."""
    loss = scheduled(qwen, kind)
    optimizer = torch.optim.AdamW(qwen.parameters(), lr=1e-3)
    batch = [qwen.preprocess(["a", "b", "c"]), qwen.preprocess(["red", "blue", "green"])]
    values, weights = [], []
    for step in range(4):
        loss.schedule.step = step
        value = sum(loss([dict(column) for column in batch]).values())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
        weights.append(getattr(loss, "loss", loss).measured.weight)
    assert weights == [5.0, 5.0, 0.0, 0.0] and values[1] < values[0] and values[3] < values[2]
