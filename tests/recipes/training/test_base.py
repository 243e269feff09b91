"""The folder `base` of a training: written whole, never over something that a user keeps."""

from __future__ import annotations

import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer

from recipes.training.base import UNFINISHED, written_base
from recipes.training.run import build, train
from tests.backbones import build as tiny
from tests.recipes.test_train import cache, config  # noqa: F401


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("backbone")
    for part in tiny("llama"):
        part.save_pretrained(path)
    return str(path)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["base", "model"])
def test_a_backbone_where_the_training_writes_is_refused(backbone, tmp_path, name):
    place = tmp_path / "out" / name
    shutil.copytree(backbone, place)
    before = files(place)
    with pytest.raises(ValueError, match=f"the backbone must lie outside .* lies in .*out/{name}.* Pass another"):
        train(config(str(place), tmp_path, tuning="lora", data=["none.jsonl"]))
    assert files(place) == before


@pytest.mark.parametrize("kept", ["notes.txt", "config.json"])
def test_a_folder_of_the_user_is_refused_and_stays(backbone, tmp_path, kept):
    base = tmp_path / "out" / "base"
    base.mkdir(parents=True)
    (base / kept).write_text("{}")
    with pytest.raises(ValueError, match=f"it holds something else .{kept}.. Move it away, or pass another"):
        build(config(backbone, tmp_path, tuning="lora"), [])
    assert files(base) == {kept: b"{}"}


def test_a_whole_base_without_checkpoints_is_kept_for_adapters_that_were_moved_away(backbone, tmp_path):
    build(config(backbone, tmp_path, tuning="lora"), [])
    base = tmp_path / "out" / "base"
    before = files(base)
    build(config(backbone, tmp_path, tuning="lora"), [])
    other, tokenizer = tiny("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    for part in (other, tokenizer):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds another model, on which adapters may stand"):
        build(config(str(tmp_path / "other"), tmp_path, tuning="lora"), [])
    assert files(base) == before


def test_a_base_that_was_killed_while_it_was_written_is_written_again(backbone, tmp_path, monkeypatch):
    save = SentenceTransformer.save_pretrained

    def killed(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformer, "save_pretrained", killed)
        build(config(backbone, tmp_path, tuning="lora"), [])
    base = tmp_path / "out" / "base"
    whole = files(base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert (base / UNFINISHED).exists()
    build(config(backbone, tmp_path, tuning="lora"), [])
    assert (base / "model.safetensors").stat().st_size == len(whole["model.safetensors"])
    assert not (base / UNFINISHED).exists()


def test_an_empty_folder_is_room(tmp_path):
    (tmp_path / "base").mkdir()
    with written_base(str(tmp_path)) as base:
        assert (base / UNFINISHED).exists()
    assert files(base) == {}
