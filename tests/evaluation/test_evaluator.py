"""A bottleneck-token model through everything: mteb's own check, the mini benchmark, the Trainer's evaluator."""

from __future__ import annotations

from importlib.util import find_spec
from statistics import fmean

import mteb
import pytest
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer

from evaluation.baselines import wrap
from evaluation.evaluator import SuiteEvaluator
from evaluation.fingerprint import fingerprint
from evaluation.mini import evaluator_for, mini_benchmark


def test_mock_run_passes_on_every_modality_that_mteb_can_generate_here(qwen):
    wrapper = wrap(qwen, "test/btok")
    assert wrapper.mteb_model_meta.modalities == ["text", "image", "video"]
    if not all(map(find_spec, ("av", "torchcodec"))):  # mteb writes and reads its mock videos with these
        limited = wrapper.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})
        wrapper.mteb_model_meta = limited
    report = mteb.mock_run(wrapper)
    assert report.all_passed
    passed = [name for name, status in report.items() if isinstance(status, TaskResult)]
    assert len(passed) > 20 and any("Image" in name for name in passed)


def test_a_saved_checkpoint_keeps_its_fingerprint(qwen, tmp_path):
    qwen.save_pretrained(str(tmp_path))
    assert fingerprint(SentenceTransformer(str(tmp_path), device="cpu")) == fingerprint(qwen)


def test_the_evaluator_agrees_with_mteb_and_restores_the_mode(qwen):
    groups = ["I-VG", "V-QA", "VisDoc"]
    evaluator = SuiteEvaluator(mini_benchmark("validation", groups=groups).tasks, name="mini-1_validation")
    qwen.train()
    scores = evaluator(qwen)
    assert qwen.training
    parts = [value for key, value in scores.items() if key != evaluator.primary_metric]
    assert len(parts) == 3 and scores[evaluator.primary_metric] == pytest.approx(fmean(parts))
    assert 0 < scores[evaluator.primary_metric] < 0.5, "an untrained model is near chance"
    results = mteb.evaluate(
        wrap(qwen.eval(), "test/btok"),
        mini_benchmark("validation", groups=groups),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )
    for result, group in zip(results.task_results, groups, strict=True):
        assert result.get_score() == pytest.approx(scores[f"mini-1_validation_mini-{group}"])


def test_the_evaluator_sees_changed_weights(qwen):
    evaluator = SuiteEvaluator(mini_benchmark("validation", groups=["VisDoc"]).tasks, name="x")
    before = evaluator(qwen)
    for parameter in qwen.parameters():
        parameter.data = parameter.data.flip(0)
    assert evaluator(qwen) != before


def test_evaluator_for_covers_the_nine_tasks_of_a_split_that_may_choose():
    evaluator = evaluator_for("mini", split="train")
    assert [task.eval_split for task in evaluator.tasks] == ["train"] * 9
    assert evaluator.primary_metric == "mini-1_train_mean" and evaluator.greater_is_better
    with pytest.raises(ValueError, match="must not choose a model"):
        SuiteEvaluator(mini_benchmark("test").tasks, name="x")
    with pytest.raises(ValueError, match="except test, got 'dev'"):
        evaluator_for("mini", split="dev")


def test_a_bare_model_is_scored_as_a_wrapped_one(qwen):
    """`mteb.evaluate(SentenceTransformer, tasks)` knows no modalities; pictures must not be dropped silently."""
    scores = []
    for model in (qwen, wrap(qwen, "test/btok")):
        results = mteb.evaluate(
            model,
            mini_benchmark("validation", groups=["I-CLS", "V-CLS"]),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        ).task_results
        scores.append([result.scores["validation"][0]["per_query"] for result in results])
    assert scores[0] == scores[1]
    assert len({value for task in scores[0] for value in task.values()}) == 2
