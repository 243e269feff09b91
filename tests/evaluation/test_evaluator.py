"""A bottleneck-token model through everything: mteb's own check, the mini benchmark, the Trainer's evaluator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import mteb
import pytest
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from sentence_transformers import SentenceTransformer

from evaluation import wrap
from evaluation.embedding.fingerprint import fingerprint
from evaluation.evaluator import SuiteEvaluator
from evaluation.mini import evaluator_for, mini_benchmark

MOCK_RUN = """
import json, sys
import mteb, torch
from sentence_transformers import SentenceTransformer
from evaluation import wrap
torch.set_num_threads(1)
wrapper = wrap(SentenceTransformer(sys.argv[1], device="cpu"))
found = wrapper.mteb_model_meta.modalities
wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update={"modalities": json.loads(sys.argv[2])})
report = mteb.mock_run(wrapper)
failed = {name: status.exception for name, status in report.items() if hasattr(status, "exception")}
print("REPORT " + json.dumps([found, wrapper.mteb_model_meta.name, report.modality_summary(), failed]))
"""


def bundled_ffmpeg(folder: Path) -> Path | None:
    """PyAV's own FFmpeg under the names that torchcodec looks for; None where it can't be had."""
    if not all(map(find_spec, ("av", "torchcodec"))):
        return None
    libraries = Path(find_spec("av").origin).parent.parent / "av.libs"
    folder.mkdir()
    for file in libraries.glob("lib*-*.so.*"):  # libavcodec-5e6b81c2.so.62.28.102 -> libavcodec.so.62
        (folder / re.sub(r"-[0-9a-f]+\.so\.(\d+).*", r".so.\1", file.name)).symlink_to(file)
    return folder if any(folder.iterdir()) else None


def mock_tasks(modality: str, asked: list[str]) -> int:
    """How many of mteb's mock tasks show a modality and need none but those asked for; audio is another model's."""
    used = [set(task.metadata.modalities) for task in ALL_MOCK_TASK_TEST_GRID]
    return sum(modality in found and found <= set(asked) for found in used)


@pytest.mark.slow
def test_mock_run_passes_on_every_modality_of_the_backbone(qwen, tmp_path):
    """In a process of its own: the loader reads LD_LIBRARY_PATH when a process starts."""
    qwen.save_pretrained(str(tmp_path / "model"))
    libraries = bundled_ffmpeg(
        tmp_path / "ffmpeg"
    )  # mteb writes its mock videos with PyAV, reads them with torchcodec
    asked = ["text", "image", "video"] if libraries else ["text", "image"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries or ""), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", MOCK_RUN, str(tmp_path / "model"), json.dumps(asked)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))
    found, name, summary, failed = json.loads(line.removeprefix("REPORT "))
    assert found == ["text", "image", "video"] and name == "local/model" and not failed
    passed = {modality: status for status, modality, _ in summary}
    counts = {modality: int(passed[modality].split("/")[1].rstrip(")")) for modality in asked}
    assert all(passed[modality] == f"✓ ({count}/{count})" for modality, count in counts.items())
    for modality, count in counts.items():  # all that there are, but one that asks for another kind of model
        assert mock_tasks(modality, asked) - 1 <= count
    assert counts["text"] >= 28 and counts["image"] >= 15
    if not libraries:
        pytest.skip("text and image passed; mteb's mock videos need PyAV and torchcodec on Linux")


def test_a_saved_checkpoint_keeps_its_fingerprint(qwen, tmp_path):
    qwen.save_pretrained(str(tmp_path))
    assert fingerprint(SentenceTransformer(str(tmp_path), device="cpu")) == fingerprint(qwen)
    before = fingerprint(qwen)
    qwen.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert fingerprint(qwen) != before, "the same weights see another picture"


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
