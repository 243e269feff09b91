"""What mteb learns of a model from `evaluation.wrap`, and what importing that costs."""

from __future__ import annotations

import subprocess
import sys

import mteb
import pytest
import torch
from sentence_transformers import SentenceTransformer

from evaluation import wrap
from evaluation.finite import NonFiniteError
from evaluation.mini import mini_benchmark
from evaluation.wrapping import MediaFirstLoader


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


@pytest.fixture
def columns(monkeypatch):
    """The keys of every input that a model is given, in their order."""
    seen = []
    encode = SentenceTransformer.encode

    def note(self, inputs, *args, **kwargs):
        seen.extend(tuple(entry) for entry in inputs if isinstance(entry, dict))
        return encode(self, inputs, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", note)
    return seen


OPTIONS = {"cache": None, "co2_tracker": False, "show_progress_bar": False}


def image_text_task():
    found = (task for task in mteb.mocks.ALL_MOCK_TASK_TEST_GRID if {"image", "text"} == set(task.metadata.modalities))
    return next(task for task in found if task.metadata.category in ("it2it", "it2t", "it2i"))


def test_media_stand_before_the_text_in_mtebs_own_tasks(qwen, columns):
    assert mteb.evaluate(wrap(qwen), image_text_task(), **OPTIONS).task_results
    assert {entry for entry in columns if len(entry) > 1} == {("image", "text")}
    assert tuple(MediaFirstLoader([{"text": ["a"], "video": [1], "id": [0]}]).__iter__().__next__()) == (
        "video",
        "text",
        "id",
    )


def test_an_embedding_that_is_not_finite_is_an_error_in_mtebs_own_tasks(qwen):
    next(parameter for name, parameter in qwen.named_parameters() if "norm" in name).data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="of the embedding of row .* numbers are NaN or infinite"):
        mteb.evaluate(wrap(qwen), image_text_task(), **OPTIONS)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, evaluation; print([name in sys.modules for name in ('mteb', 'open_clip', 'torch')])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False, False]"


def test_a_benchmark_of_ours_needs_no_name(qwen):
    assert wrap(qwen).mteb_model_meta.name == "local/model"
    assert len(mini_benchmark().tasks) == 9


def test_a_wrapper_knows_that_its_model_has_changed(qwen):
    """mteb looks for stored results by the revision before it runs a task."""
    wrapper = wrap(qwen, "a/b")
    before = wrapper.mteb_model_meta.revision
    assert wrapper.mteb_model_meta.revision == before
    parameter = next(qwen.parameters())
    old = parameter.detach().clone()
    with torch.no_grad():
        parameter += 1
    try:
        assert wrapper.mteb_model_meta.revision == wrap(qwen, "a/b").mteb_model_meta.revision != before
    finally:
        parameter.data.copy_(old)
