"""What is generated from what, and the joint rows."""

from __future__ import annotations

import pytest
import torch

from st_btok.model_parts import find_btoks
from st_btok.training.content import Content
from st_btok.training.mask import BTOK, INPUT, TARGET
from st_btok.training.targets import choose_targets, join_targets
from tests.backbones import inputs

END = 99


def content(text="", media=False):
    return Content(torch.tensor([ord(c) for c in text], dtype=torch.long), int(media))


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
