"""Token limits as characters, against what the processor really makes of inputs at the limit."""

from __future__ import annotations

import numpy as np
import pytest

from st_btok.limits import text_limits
from tests.backbones import clip, picture, sound, takes


def test_an_input_at_the_limit_has_as_many_tokens(model, family):
    """The tests' tokenizer has one token per character, where the limit is exact."""
    transformer = model[0]
    limit = 4000
    limits = text_limits(transformer, limit)

    def length(sample) -> int:
        features = transformer.preprocess([sample], processing_kwargs={"chat_template": limits})
        return features["input_ids"].shape[1]

    long = "x" * 5000
    assert length(long) == limit
    largest = {"image": picture(980, 980), "video": np.zeros((8, 980, 980, 3), np.uint8), "audio": sound(30)}
    for modality, medium in largest.items():
        if takes(family, modality):
            assert length({modality: medium, "text": long}) == limit
        else:
            assert limits[f"{modality}_chars"] == 0
    if takes(family, "video"):
        assert length({"video": clip(4), "text": long}) <= limit


def test_a_limit_without_room_is_refused(qwen):
    with pytest.raises(ValueError, match="bottleneck tokens alone take .* max_seq_length is 5"):
        text_limits(qwen[0], 5)
