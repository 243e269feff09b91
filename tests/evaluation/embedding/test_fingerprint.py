"""A fingerprint changes with every file of a model that changes its vectors, and with nothing else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from evaluation.embedding.fingerprint import fingerprint
from st_btok import build_model
from tests.backbones import build

TEXTS = ["Abc def ghi abc", "the second text, a longer one than the first"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A BTok model on a tiny Mistral, whose attention has a window."""
    folder = tmp_path_factory.mktemp("saved")
    backbone, tokenizer = build("mistral")
    build_model(backbone, processor=tokenizer, device="cpu").save_pretrained(str(folder))
    return folder


def set_in(config, name, value):
    """Set a key wherever it stands, at any depth."""
    found = 0
    for key, inner in config.items():
        if key == name:
            config[key], found = value, found + 1
        elif isinstance(inner, dict):
            found += set_in(inner, name, value)
    return found


def swap_letters(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


CHANGES = {
    "rope_theta": ("config.json", lambda c: set_in(c, "rope_theta", 50.0)),
    "rms_norm_eps": ("config.json", lambda c: set_in(c, "rms_norm_eps", 0.5)),
    "hidden_act": ("config.json", lambda c: set_in(c, "hidden_act", "relu")),
    "sliding_window": ("config.json", lambda c: set_in(c, "sliding_window", 2)),
    "normalizer": ("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}) or 1),
    "swapped letters": ("tokenizer.json", lambda t: swap_letters(t) or 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_file_that_changes_vectors_changes_the_fingerprint(change, saved, tmp_path):
    file, edit = CHANGES[change]
    shutil.copytree(saved, tmp_path / "changed")
    path = next(path for path in (tmp_path / "changed").rglob(file) if "Pooling" not in str(path))
    content = json.loads(path.read_text())
    assert edit(content), f"{file} has no {change}"
    path.write_text(json.dumps(content))
    before, after = (SentenceTransformer(str(folder), device="cpu") for folder in (saved, tmp_path / "changed"))
    assert np.abs(before.encode(TEXTS) - after.encode(TEXTS)).max() > 1e-3, "the change has to matter"
    assert fingerprint(before) != fingerprint(after)


def test_encoding_loading_and_padding_change_nothing(saved):
    model = SentenceTransformer(str(saved), device="cpu")
    seen = {fingerprint(model)}
    model.encode(TEXTS)  # leaves padding and truncation in the tokenizer
    seen.add(fingerprint(model))
    model.tokenizer.padding_side = {"left": "right", "right": "left"}[model.tokenizer.padding_side]
    seen |= {fingerprint(model), fingerprint(SentenceTransformer(str(saved), device="cpu"))}
    assert len(seen) == 1


def test_settings_in_memory_count_too(saved):
    model = SentenceTransformer(str(saved), device="cpu")
    seen = [fingerprint(model)]
    model.max_seq_length = 7
    seen.append(fingerprint(model))
    model.tokenizer.chat_template += "{# another #}"
    seen.append(fingerprint(model))
    model.similarity_fn_name = "dot"
    seen.append(fingerprint(model))
    model.half()
    seen.append(fingerprint(model))
    assert len(set(seen)) == len(seen)


def test_an_adapters_scale_counts(saved):
    found = []
    for alpha in (8, 16):
        model = SentenceTransformer(str(saved), device="cpu")
        model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights="gaussian"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(0.1)
        found.append((fingerprint(model), model.encode(TEXTS)))
    assert np.abs(found[0][1] - found[1][1]).max() > 1e-4 and found[0][0] != found[1][0]


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_omni", "qwen3_vl"])
def test_a_saved_model_keeps_its_fingerprint_and_its_pictures_count(family, tmp_path):
    backbone, processor = build(family)
    model = build_model(backbone, processor=processor, device="cpu")
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert fingerprint(loaded) == fingerprint(model)
    loaded.processor.image_processor.image_std = [0.9, 0.9, 0.9]
    assert fingerprint(loaded) != fingerprint(model)


def test_which_adapter_is_active_counts(saved):
    model = SentenceTransformer(str(saved), device="cpu")
    for number, name in enumerate(("default", "other")):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
        model.add_adapter(config, name)
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.data.fill_(0.1 + number)
    found = []
    for change in (
        lambda: model.set_adapter("default"),
        lambda: model.set_adapter("other"),
        lambda: model.disable_adapters(),
    ):
        change()
        found.append((fingerprint(model), model.encode(TEXTS)))
    assert len({name for name, _ in found}) == 3
    assert np.abs(found[0][1] - found[1][1]).max() > 1e-4 and np.abs(found[0][1] - found[2][1]).max() > 1e-4
