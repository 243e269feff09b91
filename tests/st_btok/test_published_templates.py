"""Models are built on the chat templates that families publish, and rows generate their own text on each."""

from __future__ import annotations

import logging

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from sentence_transformers import SentenceTransformer

from st_btok import build_model
from st_btok.training.content import carry_content, content_reader, read_back
from tests.backbones import build, picture, published, published_btok, takes, tokenizer
from tests.published_templates import GRANITE, LLAMA3, MISTRAL_SMALL, PUBLISHED, SMOLLM3, SMOLVLM
from tests.tiny_tokenizer import QWEN_TEMPLATE


@pytest.fixture(scope="module", params=list(PUBLISHED))
def family(request):
    return PUBLISHED[request.param][0], *published_btok(request.param)


def test_rows_generate_their_own_text(family):
    name, model, end = family
    reader = content_reader(model[0])
    assert model.tokenizer.convert_ids_to_tokens(reader.end) == end
    found = read_back(model[0])
    kinds = {"text", "text with newlines at both ends", "conversation", "texts and a conversation"}
    if takes(name, "image"):
        kinds |= {"image", "image before text", "text before image", "conversation with image"}
    prompted = {f"{kind}, with a prompt" for kind in kinds if "conversation" not in kind}
    assert kinds | prompted <= found.keys() and not any(found.values())


def test_prompts_reach_the_input_on_every_template(family):
    name, model, _ = family
    rows = ["a red kite", {"text": "a red kite", "image": picture()}][: 1 + takes(name, "image")]
    for row in rows:
        ids = model.preprocess([row], prompt="Find boats:")["input_ids"][0]
        shown = model.tokenizer.decode(ids)
        assert "Find boats:" in shown and "a red kite" in shown.partition("Find boats:")[2]
        turns = [{"role": "user", "content": "a red kite"}]
        assert "a red kite" in model.tokenizer.decode(model.preprocess([turns])["input_ids"][0])
        parts = [{"role": "user", "content": [{"type": "text", "text": "a red kite"}]}]
        assert model.preprocess([parts])["input_ids"].tolist() == model.preprocess([turns])["input_ids"].tolist()


@pytest.mark.parametrize(
    ("template", "date"),
    [
        (LLAMA3, "26 Jul 2024"),
        (GRANITE, "July 26, 2024"),
        (SMOLLM3, "26 July 2024"),
        (MISTRAL_SMALL, "The current date is 2024-07-26 (yesterday was 2024-07-25)."),
    ],
    ids=["llama3", "granite", "smollm3", "mistral small"],
)
def test_vectors_do_not_depend_on_the_day(template, date, monkeypatch, caplog, tmp_path):
    backbone, _ = build("llama")
    with caplog.at_level(logging.WARNING):
        build_model(backbone, processor=tokenizer(template), device="cpu").save_pretrained(str(tmp_path))
    assert "writes today's date" in caplog.text and "26 July 2024" in caplog.text
    model = SentenceTransformer(str(tmp_path), device="cpu")
    before = model.encode(["a kite"])
    shown = model.tokenizer.decode(model.preprocess(["a kite"])["input_ids"][0])
    assert date in shown

    class Tomorrow(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert (SentenceTransformer(str(tmp_path), device="cpu").encode(["a kite"]) == before).all()


def test_a_template_without_a_date_says_nothing(caplog):
    backbone, processor = build("qwen2_vl")
    with caplog.at_level(logging.WARNING):
        build_model(backbone, processor=processor, device="cpu")
    assert "date" not in caplog.text


def test_a_missing_pad_token_is_named():
    backbone, own = build("llama")
    own.pad_token = None
    with pytest.raises(ValueError, match=r'processor_kwargs=\{"pad_token": "<\|im_end\|>"\}'):
        build_model(backbone, processor=own, device="cpu")


def test_the_pad_token_that_is_named_is_taken(tmp_path):
    backbone, own = build("llama")
    own.pad_token = None
    backbone.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    model = build_model(str(tmp_path), processor_kwargs={"pad_token": "<|im_end|>"}, device="cpu")
    assert model.tokenizer.pad_token == "<|im_end|>" and model.encode(["a", "a longer text"]).shape[0] == 2


def test_plain_layout_finds_placeholders_of_media_that_go_first():
    backbone, processor, _ = published("llava_onevision")
    model = build_model(backbone, processor=processor, template="plain", device="cpu")
    text = model.tokenizer.decode(model.preprocess([{"image": picture(28, 28), "text": "kite"}])["input_ids"][0])
    assert text.replace("<image>", "") == "\nkite\n<|btok_0|><|btok_1|><|btok_2|><|btok_3|>" and "<image>" in text


def test_older_models_keep_their_template(qwen):
    """What was built before stays as it is: no date is pinned and nothing adapted in a template that has BToks."""
    own = qwen.tokenizer.chat_template
    model = build_model(qwen[0].model, processor=qwen[0].processor, device="cpu")
    assert model.tokenizer.chat_template == own and QWEN_TEMPLATE in own and "lacks" not in own


def test_the_template_that_is_given_wins(tmp_path):
    """A GGUF file's own template comes before it in transformers."""
    backbone, own = build("llama")
    backbone.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    given = "{%- for m in messages -%}{{- 'GIVEN ' + m['content'] -}}{%- endfor -%}"
    model = build_model(str(tmp_path), processor_kwargs={"chat_template": given}, device="cpu")
    assert "GIVEN a" in model.tokenizer.decode(model.preprocess(["a"])["input_ids"][0])


def test_a_string_is_not_dropped_by_templates_for_parts():
    backbone, processor, _ = published("smolvlm")
    assert "message.content is string" not in SMOLVLM
    model = build_model(backbone, processor=processor, device="cpu")
    carry_content(model[0])
    assert "a kite" in model.tokenizer.decode(
        model.preprocess([[{"role": "user", "content": "a kite"}]])["input_ids"][0]
    )
