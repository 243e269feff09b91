"""Pre-training: labels, curriculum, resuming to the same weights, the gate, and the committed backbone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.research import pretraining
from recipes.research.pretrain import PretrainConfig
from recipes.research.pretraining import Curriculum, Example
from recipes.toy import scenes

BACKBONE = Path(pretraining.__file__).parent.parent / "backbone"


@pytest.fixture(scope="module")
def processor():
    return pretraining.build_processor()


def test_labels_are_the_answer_and_its_end(processor):
    rows = [Example(None, "say it", "red"), Example(None, "x", "green kitten")]
    features = pretraining.encode(processor, rows)
    for labels, row in zip(features["labels"], rows, strict=True):
        assert processor.tokenizer.decode(labels[labels >= 0]) == f"{row.answer}<|im_end|>"
    bare = pretraining.encode(processor, rows, with_answer=False)
    assert processor.tokenizer.decode(bare["input_ids"][1]).endswith("<|assistant|>") and "labels" not in bare


def test_any_text_has_tokens(processor):
    text = "naïve 猫 🐈 \x00"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_chat_template_is_what_training_reads(processor):
    image = scenes.word_scene(np.random.default_rng(0), "kitten").image
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what word?"}]
    rendered = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )  # fmt: skip
    expected = pretraining.encode(processor, [Example(image, "what word?", "kitten")], with_answer=False)
    assert torch.equal(rendered["input_ids"], expected["input_ids"])
    assert torch.equal(rendered["pixel_values"], expected["pixel_values"])


def test_curriculum_grows_words_when_they_are_read():
    curriculum = Curriculum(np.random.default_rng(0))
    assert {len(curriculum.word()) for _ in range(50)} == {3}
    for loss in (0.1, 0.1, 0.9, 0.1, 0.1):
        curriculum.learned(loss)
    assert curriculum.level == 3
    curriculum.learned(0.1)
    assert curriculum.level == 4 and curriculum.recent == []
    curriculum.level = 8
    pool = set(scenes.words("pretrain"))
    words = [curriculum.word() for _ in range(200)]
    assert max(map(len, words)) == 8 and 0.3 < np.mean([word in pool for word in words]) < 0.7
    held_out = {word for split in ("validation", "test") for word in scenes.words(split) if len(word) > 4}
    assert not held_out & set(words)


def test_every_step_has_every_kind():
    curriculum = Curriculum(np.random.default_rng(0))
    for kind, (rows, _) in pretraining.MIX.items():
        batch = curriculum.batch(kind)
        assert len(batch) == rows and all((row.image is None) == (kind == "text") for row in batch)


@pytest.mark.slow
def test_resuming_gives_the_weights_of_an_unbroken_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "MIX", {kind: (2, weight) for kind, (_, weight) in pretraining.MIX.items()})
    monkeypatch.setattr(pretraining, "gate", lambda *args: {"words": 0.0, "word colours": 0.0} | dict.fromkeys(
        ("colour at a place", "place of a colour"), 0.0))  # fmt: skip
    saved = {}

    def run(name, stop):
        config = PretrainConfig(output=str(tmp_path / name), steps=4, save_steps=2)
        original = pretraining.train_step
        calls = []

        def step(*args):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(1)
            return original(*args)

        monkeypatch.setattr(pretraining, "train_step", step)
        try:
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                pretraining.train(config)
        finally:
            monkeypatch.setattr(pretraining, "train_step", original)
        saved[name] = torch.load(tmp_path / f"{name}.partial" / "state.pt", weights_only=False)

    run("whole", stop=99)
    run("broken", stop=3)  # killed in the third step, after the checkpoint of the second
    assert saved["broken"]["step"] == 2
    run("broken", stop=99)
    assert saved["broken"]["step"] == saved["whole"]["step"] == 4
    for name, tensor in saved["whole"]["model"].items():
        assert torch.equal(tensor, saved["broken"]["model"][name]), name
    assert not (tmp_path / "whole").exists(), "a backbone that fails its gate is not written"


def test_gate():
    good = {"words": 0.8, "word colours": 0.95, "colour at a place": 0.95, "place of a colour": 0.95}
    assert pretraining.passes(good)
    assert not any(pretraining.passes({**good, key: value - 0.01}) for key, value in good.items())


def test_learning_rate_warms_up_and_decays():
    config = PretrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [pretraining.learning_rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[10] == max(rates) == 1.0 and 0.1 <= rates[-1] < 0.11
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_committed_backbone_passes_its_gate():
    """The real weights on fresh scenes of the test split: 64 rows a measure here, 512 in training.json."""
    record = json.loads((BACKBONE / "training.json").read_text())
    recorded = next(value for key, value in record.items() if key.startswith("test"))
    assert pretraining.passes(recorded)
    assert sum(f.stat().st_size for f in BACKBONE.glob("*.safetensors")) <= 8 * 2**20
    model = AutoModelForImageTextToText.from_pretrained(BACKBONE, dtype=torch.float32)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    found = pretraining.gate(model.eval(), AutoProcessor.from_pretrained(BACKBONE), "test", 64)
    assert found["words"] >= 0.80
    assert min(found[key] for key in ("word colours", "colour at a place", "place of a colour")) >= 0.90
