"""The template text itself, rendered by transformers' own Jinja environment."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from st_btok import append_btoks, plain_template
from tests.backbones import QWEN_TEMPLATE

BTOKS = "<|btok_0|><|btok_1|>"


def render(template: str, messages: list[dict], **limits: int) -> str:
    return render_jinja_template(conversations=[messages], chat_template=template, **limits)[0][0]


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def text(value: str) -> dict:
    return {"type": "text", "text": value}


@pytest.mark.parametrize("messages", [user(text("hi")), [{"role": "user", "content": "hi"}]])
def test_without_limits_only_the_tokens_are_added(messages):
    assert render(append_btoks(QWEN_TEMPLATE, 2), messages) == render(QWEN_TEMPLATE, messages) + BTOKS


def test_appending_is_idempotent_and_refuses_another_number():
    template = append_btoks(QWEN_TEMPLATE, 2)
    assert append_btoks(template, 2) == template
    with pytest.raises(ValueError, match="already holds the bottleneck tokens.*but 3 were asked"):
        append_btoks(template, 3)


def test_text_is_cut_across_parts_and_turns():
    template = append_btoks(
        "{%- for m in messages -%}{%- for p in m.content -%}[{{ p.text }}]{%- endfor -%}{%- endfor -%}", 1
    )
    messages = user(text("abc"), text("def")) + user(text("ghi"))
    for limit, expected in ((99, "[abc][def][ghi]"), (4, "[abc][d][]"), (0, "[][][]")):
        assert render(template, messages, max_chars=limit) == expected + "<|btok_0|>"


def test_strings_are_cut_and_instructions_are_not():
    template = append_btoks("{%- for m in messages -%}[{{ m.content }}]{%- endfor -%}", 1)
    messages = [{"role": "system", "content": "Find:"}, {"role": "user", "content": "kitten"}]
    assert render(template, messages, max_chars=3) == "[Find:][kit]<|btok_0|>"


def test_media_take_their_room_and_are_never_cut():
    template = append_btoks(QWEN_TEMPLATE, 2)
    messages = user({"type": "image"}, text("abcdef"), {"type": "video", "video": [0, 0]})
    limits = {"image_chars": 10, "video_chars": 8}
    assert "abcdef<" in render(template, messages, max_chars=24, **limits)
    assert "|>abc<" in render(template, messages, max_chars=21, **limits)
    kept = render(template, messages, max_chars=18, **limits)
    assert (
        kept.count("<|image_pad|>") == kept.count("<|video_pad|>") == 1
        and "a" not in kept.split("user")[1].split("pad")[2]
    )
    with pytest.raises(Exception, match="'abcdef' may take the room of 18 characters, the limit max_chars is 17"):
        render(template, messages, max_chars=17, **limits)


@pytest.mark.parametrize("nested", [{"type": "message", "message": user(text("hi"))}, user(text("hi"))[0]])
def test_nested_conversations_are_unwrapped(nested):
    template = append_btoks(QWEN_TEMPLATE, 2)
    assert render(template, user(nested)) == render(template, user(text("hi")))


def test_nested_media_are_refused():
    nested = {"type": "message", "message": user({"type": "image"})}
    with pytest.raises(Exception, match="image content can't share a batch"):
        render(append_btoks(QWEN_TEMPLATE, 2), user(nested))


def test_plain_layout():
    template = append_btoks(plain_template("<img>", "<vid>"), 2)
    messages = [{"role": "system", "content": [text("Find: ")]}] + user(
        text("a cat"), {"type": "image"}, {"type": "video"}
    )
    assert render(template, messages) == "<img>\n<vid>\nFind: a cat\n" + BTOKS
    assert render(template, user(text("ends\n"))) == "ends\n" + BTOKS, "exactly one closing newline"
    assert render(template, user({"type": "image"})) == "<img>\n" + BTOKS
    with pytest.raises(ValueError, match="must not hold quotes"):
        plain_template("it's")
