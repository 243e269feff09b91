"""The prompted baseline against bare transformers: what is rendered, and which states are read."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from recipes.research.prompted import prompted_model
from recipes.research.variant import Variant, VariantSettings
from recipes.research.variants import build_variant
from tests.backbones import build

PROMPT = " The topic is the"
TEXTS = ["a", "an old lighthouse by the sea"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model, tokenizer = build("llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def states(backbone: str, text: str, prompt: str, opened: bool) -> torch.Tensor:
    """Last-layer states of one text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    turns = [{"role": "user", "content": text}]
    shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened) + prompt
    ids = tokenizer(shown, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return AutoModel.from_pretrained(backbone).eval()(input_ids=ids).last_hidden_state[0]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_what_is_read_behind_the_prompt(backbone, pooling, opened):
    model = prompted_model(backbone, pooling, PROMPT, opened, "cpu")
    number = len(AutoTokenizer.from_pretrained(backbone)(PROMPT, add_special_tokens=False)["input_ids"])
    expected = [states(backbone, text, PROMPT, opened)[-1 if pooling == "lasttoken" else -number :] for text in TEXTS]
    expected = torch.nn.functional.normalize(torch.stack([rows.mean(0) for rows in expected]), dim=-1)
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), expected, atol=2e-5, rtol=0)


def test_a_cut_text_keeps_the_prompt(backbone):
    model = prompted_model(backbone, "lasttoken", PROMPT, True, "cpu", max_seq_length=64)
    ids = model.preprocess(["word " * 200])["input_ids"][0]
    assert len(ids) == 64
    assert model.tokenizer.decode(ids).endswith(PROMPT)


def test_the_options_of_a_variant(backbone, tmp_path):
    settings = VariantSettings(backbone, 1, device="cpu")
    variant = Variant.parse(f"lasttoken:opened=true,prompt={PROMPT}")
    model, _ = build_variant(variant, settings, 0)
    assert model.tokenizer.decode(model.preprocess(["a"])["input_ids"][0]).endswith(PROMPT)
    shown = AutoTokenizer.from_pretrained(backbone).apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    model, _ = build_variant(Variant.parse("btok:opened=true,num_btoks=2"), settings, 0)
    assert model.tokenizer.decode(model.preprocess(["a"])["input_ids"][0]) == f"{shown}<|btok_0|><|btok_1|>"
    bare = AutoTokenizer.from_pretrained(backbone)
    bare.chat_template = None
    AutoModel.from_pretrained(backbone).save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    plain = prompted_model(str(tmp_path), "lasttoken", PROMPT, device="cpu")
    assert plain.tokenizer.decode(plain.preprocess(["a"])["input_ids"][0]) == f"a{PROMPT}"
    with pytest.raises(ValueError, match="opened=true needs a backbone with a chat template"):
        prompted_model(str(tmp_path), "lasttoken", PROMPT, True, "cpu")
