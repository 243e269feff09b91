"""What the limits are measured from, against what the processor really makes of inputs at the limit."""

from __future__ import annotations

import logging
import unicodedata

import numpy as np
import pytest
from PIL import Image
from tokenizers import normalizers
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from st_btok import build_model
from st_btok.limits import growing_characters, set_max_seq_length
from st_btok.model_parts import find_btoks
from tests.backbones import QWEN_TEMPLATE, build, picture, published, sound, takes, tokenizer

LIMIT = 4000


def test_inputs_of_the_largest_media_keep_the_limit(model, family):
    """The tests' tokenizer has one token per byte, so that the bound is nearly exact: 90 % of the limit is used."""
    transformer, ids = find_btoks(model)
    set_max_seq_length(transformer, LIMIT)
    limits = transformer.processing_kwargs["chat_template"]
    long = "x" * 5000
    assert transformer.preprocess([long])["input_ids"].shape[1] == LIMIT
    largest = {
        "image": [picture(980, 980), picture(1400, 14), picture(14, 1400), picture(1120, 896)],
        "video": [np.zeros((8, 980, 980, 3), np.uint8)],
        "audio": [sound(30)],
    }
    for modality, media in largest.items():
        if not takes(family, modality):
            assert limits[f"{modality}_tokens"] == 0
            continue
        for medium in media:
            row = transformer.preprocess([{modality: medium, "text": long}])["input_ids"][0].tolist()
            assert 0.9 * LIMIT <= len(row) <= LIMIT and row[-4:] == ids


def longrope():
    """A Llama whose rotary embeddings change for rows of more than 96 tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 96, **factors}
    backbone, processor = build("llama")
    config = backbone.config.__class__.from_dict(
        {**backbone.config.to_dict(), "rope_parameters": rope, "max_position_embeddings": 2048}
    )
    other = type(backbone)(config).eval()
    other.load_state_dict(backbone.state_dict())
    return other, processor


def test_a_long_row_changes_no_other_under_longrope(caplog):
    backbone, processor = longrope()
    model = build_model(backbone, processor=processor, device="cpu")
    assert model.max_seq_length == 96 and "once one of them is longer than 96 tokens" in caplog.text
    alone, beside = model.encode(["a short text"]), model.encode(["a short text", "long " * 100])[:1]
    np.testing.assert_allclose(beside, alone, atol=1e-6)
    caplog.clear()
    longer = build_model(backbone, processor=processor, device="cpu", max_seq_length=500)
    assert "max_seq_length=500 lets such rows in" in caplog.text
    beside = longer.encode(["a short text", "long " * 100])[:1]
    assert np.abs(beside - alone).max() > 1e-3, "what the warning is about"


def test_the_longest_image_is_counted_not_the_square_one(qwen):
    """16 patches fit into the largest area as 4 x 4, but 1 x 56 where an image is as thin as the processor takes."""
    lengths = [len(qwen[0].preprocess([Image.new("RGB", size)])["input_ids"][0]) for size in ((980, 980), (3980, 20))]
    counted = qwen[0].processing_kwargs["chat_template"]["image_tokens"]
    assert lengths[1] > lengths[0] + 30 and counted >= lengths[1] - lengths[0] + 16


def test_frames_in_a_list_are_counted(qwen):
    del qwen[0].preprocess  # which counts real tokens for a loss
    set_max_seq_length(qwen[0], 1200)
    largest = [picture(112, 112, seed) for seed in range(24)]
    row = qwen[0].preprocess([{"video": largest, "text": "x" * 5000}])["input_ids"][0].tolist()
    assert 12 * 16 < len(row) <= 1200 and row[-4:] == find_btoks(qwen)[1]
    with pytest.raises(Exception, match="media must leave room"):
        qwen[0].preprocess([{"video": largest * 4, "text": "x"}])


def test_a_processor_that_takes_no_video_takes_the_rest(monkeypatch, caplog):
    """As Cosmos3-Edge's in transformers 5.23, which asks for times that it did not have made."""

    def refuse(self, *args, **options):
        raise KeyError("video_metadata")

    monkeypatch.setattr(Qwen2VLVideoProcessor, "__call__", refuse)
    backbone, processor = build("qwen2_vl")
    with caplog.at_level(logging.WARNING):
        model = build_model(backbone, processor=processor, device="cpu")
    assert "takes no video, bare or with its times ('video_metadata')" in caplog.text
    assert model.encode([{"image": picture(), "text": "a"}]).shape == (1, 32)
    with pytest.raises(KeyError, match="video_metadata"):
        model.encode([{"video": np.zeros((4, 56, 56, 3), np.uint8), "text": "a"}])


@pytest.mark.parametrize("end", ["", " " * 40])
def test_text_that_a_template_trims_is_cut_and_not_refused(end):
    """Gemma 3 and 4 trim: the blanks that were counted at the end of the text are no part of what is too much."""
    backbone, processor, _ = published("gemma3")
    model = build_model(backbone, processor=processor, max_seq_length=300, device="cpu")
    row = model.preprocess([{"image": picture(), "text": "kitten " * 100 + end}])["input_ids"][0].tolist()
    assert 250 < len(row) <= 300 and row[-4:] == find_btoks(model)[1]


@pytest.mark.parametrize("limit", [96, 128, 192, 700])
def test_no_image_is_refused_at_a_small_limit(limit, caplog):
    """Whatever its shape: the largest area is lowered, with a warning, until the longest image has room."""
    own = tokenizer()
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}),
        own,
        Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )
    backbone, _ = build("qwen2_vl")
    with caplog.at_level(logging.WARNING):
        model = build_model(backbone, processor=processor, max_seq_length=limit, device="cpu")
    assert "max_pixels is lowered from 1003520 to" in caplog.text and f"max_seq_length={limit}" in caplog.text
    for size in ((28, 28), (2000, 2000), (20, 3980), (3980, 20), (300, 900)):
        row = model[0].preprocess([{"image": Image.new("RGB", size), "text": "x" * 900}])["input_ids"][0].tolist()
        assert len(row) <= limit and row[-4:] == find_btoks(model)[1] and model.tokenizer.decode(row).count("x") > 3


def test_max_pixels_that_is_given_stays(caplog):
    backbone, processor = build("qwen2_vl")
    with caplog.at_level(logging.WARNING):
        model = build_model(backbone, processor=processor, max_seq_length=128, max_pixels=28 * 28 * 400, device="cpu")
    assert model[0].processing_kwargs["image"]["size"]["longest_edge"] == 28 * 28 * 400
    assert "Image input can take up to 402 tokens" in caplog.text and "encode_checked" in caplog.text


def test_a_limit_with_room_lowers_nothing(caplog):
    backbone, processor = build("qwen2_vl")
    with caplog.at_level(logging.WARNING):
        model = build_model(backbone, processor=processor, max_seq_length=2048, device="cpu")
    assert model[0].processing_kwargs["image"]["size"] == dict(processor.image_processor.size)
    assert "max_pixels" not in caplog.text and "refuses" not in caplog.text


def test_a_limit_without_room_is_refused(qwen):
    with pytest.raises(ValueError, match="bottleneck tokens alone take .* max_seq_length is 5"):
        set_max_seq_length(qwen[0], 5)


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD"])
def test_characters_that_grow_are_those_of_the_unicode_form(form):
    """Against Python's tables of Unicode 3.2 (its others are newer than tokenizers'): none grows more than found."""
    own = tokenizer()
    own.backend_tokenizer.normalizer = getattr(normalizers, form)()
    found, growth = growing_characters(own)
    largest = 0
    for code in [*range(0xD800), *range(0xE000, 0x20000)]:
        character = chr(code)
        grown = len(unicodedata.ucd_3_2_0.normalize(form, character).encode()) - len(character.encode())
        assert grown <= 0 or character in found, (hex(code), grown)
        largest = max(largest, grown)
    assert growth >= largest > 0
    assert growing_characters(tokenizer()) == ("", 0)
