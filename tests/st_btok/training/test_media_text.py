"""The processor's own text is found at the end of a run, at a cost that does not grow with the text before it."""

from __future__ import annotations

import pytest

from st_btok.training.targets import ContentReader

FAMILIES = ["qwen3_vl", "internvl", "smolvlm"]  # whose processors write between frames


def by_trying_every_start(found, run):
    """What is meant, without any bound: the longest end that is the processor's."""
    for start in range(len(run)):
        if found.pattern.fullmatch(str(found.tokenizer.decode(run[start:]))):
            return run[:start]
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_end_is_found_as_by_trying_every_start(btok_model, family):
    model = btok_model(family)
    found = ContentReader(model[0]).media_text
    written = ["<0.2 seconds>", "<1234.5 seconds>", "Frame1: ", "Frame12: ", "Frame from 00:01:", "\n"]
    texts = ["", "a", "What happens at <2.0 seconds>", "Frame", "red kitten " * 8, "<0.3 seconds> or Frame2: "]
    cut = 0
    for text in texts:
        for end in [*written, *(f"{a}{b}" for a in written[:3] for b in written[:3])]:
            run = model.tokenizer.encode(text + end, add_special_tokens=False)
            expected = by_trying_every_start(found, run)
            assert found._without_end(run) == expected
            cut += len(expected) < len(run)
    assert cut > 0, "some of these are this family's"


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_cost_no_more(btok_model, family, monkeypatch):
    """Tokens decoded, as a count: it is equal for 200 and for 3,200 tokens of text."""
    model = btok_model(family)
    found = ContentReader(model[0]).media_text
    counts = []
    decode = type(model.tokenizer).decode
    monkeypatch.setattr(
        type(model.tokenizer),
        "decode",
        lambda self, ids, *a, **k: counts.append(len(ids)) or decode(self, ids, *a, **k),
    )
    totals = []
    for end in ("", "<0.2 seconds>", "Frame1: "):
        for repeats in (100, 800):
            run = model.tokenizer.encode("red kitten " * repeats + end, add_special_tokens=False)
            counts.clear()
            found._without_end(run)
            totals.append(sum(counts))
    assert totals[0::2] == totals[1::2]
