"""What is generated from what, and the joint rows."""

from __future__ import annotations

import pytest
import torch

from st_btok import build_model
from st_btok.model_parts import find_btoks
from st_btok.training.mask import BTOK, INPUT, TARGET
from st_btok.training.targets import Content, ContentReader, choose_targets, join_targets
from tests.backbones import build, clip, inputs, picture, sound, takes, tokenizer

END = 99


def texts(model, samples, prompt=None, **options) -> list[tuple[str, bool]]:
    reader = ContentReader(model[0], **options)
    contents = reader.read(model.preprocess(samples, prompt=prompt))
    return [(model.tokenizer.decode(content.text), content.has_media) for content in contents]


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_content_is_the_text_without_anything_around_it(btok_model, family, template, side):
    model = btok_model(family, template=template)
    model.tokenizer.padding_side = side
    samples = ["a red kitten", "x", "", " two\nlines "]
    expected = [("a red kitten", False), ("x", False), ("", False), ("two\nlines", False)]
    if takes(family, "image"):
        samples += [picture(), {"image": picture(), "text": "what?"}]
        expected += [("", True), ("what?", True)]
    if takes(family, "audio"):
        samples += [{"audio": sound()}, {"audio": sound(), "text": "who?"}]
        expected += [("", True), ("who?", True)]
    if takes(family, "video") and family != "smolvlm":
        # Qwen3-VL and InternVL write time stamps or numbers between the frames.
        samples += [
            {"video": clip(), "text": "when?"},
            {"video": clip(4, 1)},
            {"text": "is it <it>? ", "video": clip()},
        ]
        expected += [("when?", True), ("", True), ("is it <it>?", True)]
    found = texts(model, samples)
    for got, wanted in zip(found, expected, strict=True):
        assert got[1] == wanted[1]
        assert wanted[0] is None or got[0] == wanted[0]


def test_what_smolvlm_writes_around_videos_is_not_content(btok_model):
    samples = [{"video": clip(5)}, {"video": clip(3), "text": "when?"}, {"text": "in this video:", "video": clip(16)}]
    found = texts(btok_model("smolvlm"), samples)
    assert found == [("", True), ("when?", True), ("in this video:", True)]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_instructions_are_not_content(btok_model, family, template):
    model = btok_model(family, template=template)
    told = texts(model, ["kitten"], prompt="Find a thing: ", instructions=["Find a thing: ", "Find"])
    assert told == [("kitten", False)]
    if template == "chat":
        assert texts(model, ["kitten"], prompt="Any other: ") == [("kitten", False)], "a turn of its own"


def test_targets_close_with_the_end_of_turn(model):
    assert model.tokenizer.convert_ids_to_tokens(ContentReader(model[0]).end) == "<|im_end|>"


def content(text="", media=False):
    return Content(torch.tensor([ord(c) for c in text], dtype=torch.long), media)


def chosen(query, positive, target="auto", longest=10):
    from_query, from_positive = choose_targets([query], [positive], target, END, longest)
    return from_query[0].tolist(), from_positive[0].tolist()


Q, P = [ord("q"), END], [ord("p"), END]


@pytest.mark.parametrize(
    ("query", "positive", "target", "expected"),
    [
        (content("", True), content("p"), "auto", (P, [])),
        (content("q"), content("", True), "auto", ([], Q)),
        (content("q"), content("p"), "auto", (P, [])),
        (content("q", True), content("p"), "auto", (P, [])),
        (content("q"), content("p", True), "auto", ([], Q)),
        (content("q", True), content("p", True), "auto", (P, [])),
        (content("q", True), content("", True), "auto", ([], Q)),
        (content("", True), content("", True), "auto", ([], [])),
        (content("q"), content("p"), "query", ([], Q)),
        (content("q"), content("p"), "positive", (P, [])),
        (content("q"), content("p"), "both", (P, Q)),
        (content("q"), content("", True), "both", ([], Q)),
        (content("q"), content("p"), "none", ([], [])),
        (content("q"), content("p"), "self", (Q, P)),
        (content("", True), content("p", True), "self", ([], P)),
        (content("", True), content("p"), "query", ([], [])),
    ],
)
def test_sides(query, positive, target, expected):
    assert chosen(query, positive, target) == expected


def test_long_targets_are_cut_and_not_closed():
    abc = content("abc")
    assert chosen(abc, abc, "positive", 3)[0] == [97, 98, 99]
    assert chosen(abc, abc, "positive", 4)[0] == [97, 98, 99, END]


@pytest.mark.parametrize("side", ["left", "right"])
def test_joint_rows(side):
    """Two rows of lengths 4 and 2 (BToks 8 and 9 last) with targets of lengths 0 and 3."""
    rows = {"left": [[1, 2, 8, 9], [0, 0, 8, 9]], "right": [[1, 2, 8, 9], [8, 9, 0, 0]]}[side]
    mask = {"left": [[1, 1, 1, 1], [0, 0, 1, 1]], "right": [[1, 1, 1, 1], [1, 1, 0, 0]]}[side]
    kinds = {"left": [[0, 1, 0, 0], [0, 0, 0, 0]], "right": [[0, 1, 0, 0], [0, 0, 0, 0]]}[side]
    features = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor(kinds),
        "pixel_values": torch.ones(3, 5),
        "modality": "message",
    }
    batch = join_targets(features, [torch.tensor([], dtype=torch.long), torch.tensor([5, 6, 7])], [8, 9])
    assert batch.features["input_ids"].tolist() == [[1, 2, 8, 9, 0], [8, 9, 5, 6, 7]]
    assert batch.features["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch.features["mm_token_type_ids"].tolist() == [[0, 1, 0, 0, 0], [0] * 5]
    assert batch.features["pixel_values"] is features["pixel_values"] and batch.features["modality"] == "message"
    assert batch.segments.tolist() == [[INPUT, INPUT, BTOK, BTOK, INPUT], [BTOK, BTOK, TARGET, TARGET, TARGET]]
    assert batch.predictors.tolist() == [[1, 1], [1, 2], [1, 3]], "the last BTok predicts the first target token"
    assert batch.labels.tolist() == [5, 6, 7]
    restored = batch.features["input_ids"].gather(1, batch.positions)
    valid = features["attention_mask"].bool()
    assert torch.equal(restored[valid], features["input_ids"][valid]), "every real token is found again"
    assert features["input_ids"].tolist() == rows, "the column's own features stay"


def test_every_modality_joins(qwen):
    _, ids = find_btoks(qwen)
    features = qwen.preprocess(inputs("qwen2_vl")[:-1])
    targets = [torch.arange(3, 3 + n) for n in range(len(features["input_ids"]))]
    batch = join_targets(features, targets, ids)
    assert (batch.segments == BTOK).sum() == 4 * len(targets)
    assert batch.features["attention_mask"].sum() == features["attention_mask"].sum() + sum(map(len, targets))
    for row, target in enumerate(targets):
        length = int(features["attention_mask"][row].sum())
        assert batch.features["input_ids"][row, length : length + len(target)].tolist() == target.tolist()


def test_a_tokenizer_without_end_of_turn_is_refused():
    backbone, processor = build("llama")
    own = tokenizer("{%- for m in messages -%}{{ m.content }}{%- endfor -%}")
    model = build_model(backbone, processor=own, device="cpu")
    assert ContentReader(model[0]).end == own.eos_token_id
    model.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-turn token"):
        ContentReader(model[0])


def test_a_reader_does_not_read_the_vocabulary(qwen, monkeypatch):
    """At 151,646 tokens that took 0.9 s for every loss; only ids at either end of a text are looked at."""
    decoded = []
    own = type(qwen.tokenizer).decode
    monkeypatch.setattr(
        type(qwen.tokenizer),
        "decode",
        lambda self, ids, *args, **kwargs: decoded.append(ids) or own(self, ids, *args, **kwargs),
    )
    reader = ContentReader(qwen[0])
    reader.read(qwen.preprocess([{"image": picture(), "text": " what? "}, "b"]))
    assert 0 < len(decoded) < 60 < len(qwen.tokenizer)
