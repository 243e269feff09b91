"""Mini-batches of features: every row keeps exactly its own media, over every family and mix."""

from __future__ import annotations

import pytest
import torch

from st_btok.model_parts import media_tokens
from st_btok.training.slicing import row_offsets, take_rows
from tests.backbones import inputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_slice_embeds_like_its_rows(model, family, side):
    model.tokenizer.padding_side = side
    samples = inputs(family)[:-1]
    samples = [samples[i] for i in torch.randperm(len(samples), generator=torch.Generator().manual_seed(1)).tolist()]
    features = model.preprocess(samples)
    offsets = row_offsets(features, media_tokens(model[0]))
    with torch.no_grad():
        whole = model(dict(features))["sentence_embedding"]
        last = len(samples) - 1
        for rows in ([0], [1, 2], [*range(2, last + 1)], [last], [last, 0, 2], [*range(last, -1, -1)]):
            part = take_rows(features, rows, offsets)
            torch.testing.assert_close(model(part)["sentence_embedding"], whole[rows], atol=1e-5, rtol=0)


def test_columns_that_are_padding_in_all_rows_are_dropped(qwen):
    features = qwen.preprocess(["a", "a longer text", "b"])
    offsets = row_offsets(features, media_tokens(qwen[0]))
    part = take_rows(features, [2], offsets)
    assert torch.equal(part["input_ids"], qwen.preprocess(["b"])["input_ids"])
    assert part["modality"] == features["modality"]


def test_media_that_can_not_be_told_apart_are_an_error():
    features = {
        "input_ids": torch.tensor([[7, 7, 7, 7, 1], [7, 7, 1, 1, 1]]),
        "attention_mask": torch.ones(2, 5),
        "pixel_values": torch.zeros(4, 3, 2, 2),
    }
    with pytest.raises(ValueError, match=r"pixel_values has 4 entries for rows with \[4, 2\] placeholder tokens"):
        row_offsets(features, {"image": 7})
    features["pixel_values"] = torch.zeros(3, 3, 2, 2)
    assert row_offsets(features, {"image": 7})["pixel_values"] == [0, 2, 3], "2 tokens for each tile"
