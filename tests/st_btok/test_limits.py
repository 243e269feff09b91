"""Token limits as characters, against what the processor really makes of inputs at the limit."""

from __future__ import annotations

import pytest

from st_btok.limits import text_limits
from tests.backbones import clip, picture


def test_an_input_at_the_limit_has_as_many_tokens(model, family):
    """The tests' tokenizer has one token per character, where the limit is exact."""
    transformer = model[0]
    limits = text_limits(transformer, 120)
    full = transformer.preprocess(["x" * 500], processing_kwargs={"chat_template": limits})
    assert full["input_ids"].shape[1] == 120
    if family == "llama":
        assert limits["image_chars"] == limits["video_chars"] == 0
        return
    largest = {"image": picture(980, 980), "text": "x" * 500}
    assert transformer.preprocess([largest], processing_kwargs={"chat_template": limits})["input_ids"].shape[1] == 120
    video = {"video": clip(4), "text": "x" * 500}
    assert transformer.preprocess([video], processing_kwargs={"chat_template": limits})["input_ids"].shape[1] <= 120


def test_a_limit_without_room_is_refused(qwen):
    with pytest.raises(ValueError, match="bottleneck tokens alone take .* max_seq_length is 5"):
        text_limits(qwen[0], 5)
