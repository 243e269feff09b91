"""Text beside media gives way to the token, whenever the limit was set."""

from __future__ import annotations

import numpy as np
import pytest

from st_btok.inputs.encode import encode_checked
from st_btok.limits import UNLIMITED
from tests.backbones import BUILDERS, clip, picture, takes

TAKE = {kind: [name for name in BUILDERS if takes(name, kind)] for kind in ("image", "video", "audio")}


def user(*parts: object) -> list:
    return [{"role": "user", "content": list(parts)}]


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max())


def test_a_limit_set_later_holds_for_media_too(btok_model):
    """Lowered, where plain `encode` would lose the BToks, and raised, where its template still cuts."""
    model = btok_model("qwen2_vl", max_seq_length=300)
    row = {"image": picture(56, 56), "text": "a long text " * 60}
    rows = ["a long text " * 60, row, {**row, "text": "short"}, {"image": [picture(56, 56)] * 120, "text": "many"}]
    for limit in (200, 600):
        model.max_seq_length = limit
        result = encode_checked(model, rows, "skip")
        assert result.rows == [0, 1, 2] and f"max_seq_length is {limit}" in result.skipped[0].reason
        tokens = encode_checked(model, rows[:3], output_value="token_embeddings").embeddings
        assert [len(part) for part in tokens[:2]] == [limit, limit] and len(tokens[2]) < 100
        assert difference(encode_checked(model, rows[:3]).embeddings, result.embeddings) < 1e-5
    whole = encode_checked(model, rows[:2], processing_kwargs=UNLIMITED, output_value="token_embeddings").embeddings
    assert min(len(part) for part in whole) > 720


@pytest.mark.parametrize("name", TAKE["image"])
def test_media_and_long_text_use_the_whole_limit_on_every_family(btok_model, name):
    """In every order, in turns too; the text that stays is the same as if the user had cut it there."""
    limit = 500 if name in ("smolvlm", "idefics3") else 300
    model = btok_model(name, max_seq_length=limit)
    long = "words and more words. " * 60
    image = {"type": "image", "image": picture(56, 56)}
    rows = [
        {"image": picture(56, 56), "text": long},
        {"text": long, "image": picture(56, 56)},
        user(image, text(long)),
        user(text(long), image),
        [*user(text("first")), *user(text(long), image)],
    ]
    single = [encode_checked(model, [row], output_value="token_embeddings").embeddings[0] for row in rows]
    assert {len(states) for states in single} == {limit}, "one token a byte"
    together = encode_checked(model, rows, batch_tokens=10**6).embeddings
    assert difference(together, np.concatenate([encode_checked(model, [row]).embeddings for row in rows])) < 1e-5
    whole = encode_checked(model, [{**rows[0], "text": ""}], output_value="token_embeddings").embeddings[0]
    cut = {**rows[0], "text": long[: limit - len(whole)]}
    assert difference(encode_checked(model, [cut]).embeddings[0], together[0]) < 1e-5


def test_long_videos_are_counted_in_full(btok_model):
    model = btok_model("qwen2_vl", max_seq_length=700)
    long = "words and more words. " * 60
    rows = [{"video": clip(24), "text": long}, {"video": list(clip(24)), "text": long}, {"video": clip(2000)}]
    result = encode_checked(model, rows, "skip", output_value="token_embeddings")
    assert [len(states) for states in result.embeddings] == [700, 700]
    assert "media must leave room" in result.skipped[0].reason
