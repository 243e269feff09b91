"""Bare text gets the ids of the right prompt, from tokenizer.json alone; sentence-transformers' vectors stay."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GemmaTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from st_btok import build_model
from st_btok.bare_text import frame_bare_text
from tests.backbones import BUILDERS, MODALITIES, build, inputs
from tests.tiny_tokenizer import TEXT, tokenizer

TEXTS = ["Which town lies by the sea?", "a", "3 kites\n  and 東京", "two  blanks", "-"]
TEXT_ONLY = [name for name in BUILDERS if not MODALITIES[name]]
# Writes a bos token and trims, as Gemma's own does.
TRIMMING = (
    "{{- bos_token -}}{%- for turn in messages -%}"
    "{{- '<start>' + turn.role + '\n' + turn.content | trim + '<end>\n' -}}{%- endfor -%}"
)


def prompts(model, texts) -> list[list[int]]:
    return [model.preprocess([text])["input_ids"][0].tolist() for text in texts]


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_bare_text_is_the_prompt(name, template, btok_model, tmp_path):
    model = btok_model(name, template=template, readout="last")
    model.save_pretrained(str(tmp_path))
    expected = prompts(model, TEXTS)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # as an engine in another language reads it
    assert [raw.encode(text).ids for text in TEXTS] == expected
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == expected
    assert raw.encode(TEXTS[0], add_special_tokens=False).ids == tokenizer()(TEXTS[0])["input_ids"]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_vectors_are_those_without_it(template, btok_model, monkeypatch, tmp_path):
    model = btok_model("llama", template=template)
    monkeypatch.setattr("st_btok.model.frame_bare_text", lambda transformer: False)
    backbone, processor = build("llama")
    before = build_model(backbone, processor=processor, template=template, device="cpu")
    assert before.tokenizer("a")["input_ids"] == tokenizer()("a")["input_ids"]
    samples = [*TEXTS, *inputs("llama"), " blanks at the ends\n", "", "red kite " * 900]
    expected = before.encode(samples)
    model.save_pretrained(str(tmp_path))
    for found in (model, SentenceTransformer(str(tmp_path), device="cpu")):
        assert np.array_equal(found.encode(samples), expected)
        assert np.array_equal(found.encode(samples, prompt="Find it"), before.encode(samples, prompt="Find it"))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_text_over_the_limit_is_cut_alike(template, btok_model):
    model = btok_model("llama", template=template, max_seq_length=60)
    texts = ["red kite " * 20, "red kite " * 7, "東京の夜" * 30]
    cut = model.tokenizer(texts, truncation=True, max_length=60)["input_ids"]
    assert cut == prompts(model, texts)
    assert {len(ids) for ids in cut} == {60}


def sentencepiece(kind, **options):
    """A tokenizer of one of transformers' own classes, with byte fallback."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyzW?\n", "▁t", "▁to", "wn"]
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return kind(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[("▁", "t"), ("▁t", "o"), ("w", "n")],
        extra_special_tokens=["<start>", "<end>"],
        chat_template=TRIMMING,
        **names,
        **options,
    )


@pytest.mark.parametrize("kind", [GemmaTokenizer, LlamaTokenizer])
def test_a_bos_token_stands_once_and_loading_keeps_the_frame(kind, tmp_path):
    sentencepiece(kind, **({"add_prefix_space": False} if kind is LlamaTokenizer else {})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "add_bos_token": True})
    )  # as older ones have
    own = kind.from_pretrained(tmp_path)
    backbone = LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": len(own) + 4}))
    model = build_model(backbone, processor=own, device="cpu")
    model.save_pretrained(str(tmp_path))
    expected = prompts(model, TEXTS)
    assert expected[0].count(own.bos_token_id) == 1
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXTS[0]).ids == expected[0]
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == expected


def test_where_text_does_not_keep_its_tokens_nothing_is_changed():
    """A blank in front of every text, which the template's turn has before the role instead."""
    own = sentencepiece(LlamaTokenizer)
    backbone = LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": len(own) + 4}))
    model = build_model(backbone, processor=own, device="cpu")
    assert not frame_bare_text(model[0])
    assert model.tokenizer.convert_ids_to_tokens(model.tokenizer("a")["input_ids"]) == ["▁", "a"]


def test_a_processor_would_write_them_twice(btok_model):
    model = btok_model("qwen2_vl")
    assert not frame_bare_text(model[0])
    assert model.tokenizer("a")["input_ids"] == tokenizer()("a")["input_ids"]
