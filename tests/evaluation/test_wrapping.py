"""What mteb learns of a model from `evaluation.wrap`, and what importing that costs."""

from __future__ import annotations

import subprocess
import sys

import mteb
import pytest
from sentence_transformers import SentenceTransformer

from evaluation import wrap
from evaluation.mini import mini_benchmark


def test_the_name_is_the_folder_a_model_was_loaded_from(qwen, tmp_path):
    qwen.save_pretrained(str(tmp_path / "my-model"))
    model = SentenceTransformer(str(tmp_path / "my-model"), device="cpu")
    meta = wrap(model).mteb_model_meta
    assert meta.name == "local/my-model" and meta.modalities == ["text", "image", "video"]
    assert wrap(model, "owner/name").mteb_model_meta.name == "owner/name"


def test_mteb_refuses_pictures_for_a_bare_model_and_takes_a_wrapped_one(qwen, tmp_path):
    """mteb's own image tasks check the modalities; the mock task that ranks pictures is the smallest of them."""
    qwen.save_pretrained(str(tmp_path / "model"))
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    name = "MockMultilingualImageText2ImageRetrieval"
    task = next(task for task in mteb.mocks.ALL_MOCK_TASK_TEST_GRID if "image" in task.metadata.modalities)
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    bare = mteb.models.SentenceTransformerEncoderWrapper(model).mteb_model_meta
    assert "image" not in (bare.modalities or []), f"should mteb learn to read them, wrap and {name} can go"
    with pytest.raises(ValueError, match="none overlap with task"):
        mteb.evaluate(model, task, **options)
    assert mteb.evaluate(wrap(model), task, **options).task_results


def test_importing_the_package_does_not_import_mteb():
    code = "import sys, evaluation; print('mteb' in sys.modules, 'open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_benchmark_of_ours_needs_no_name(qwen):
    assert wrap(qwen).mteb_model_meta.name == "local/model"
    assert len(mini_benchmark().tasks) == 9
