"""Dropped negatives: against a loss written out by hand, for every direction, with duplicates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from st_btok import BTokLoss, btok_lora_config
from st_btok.training.negatives import FilteredSimilarity, content_fingerprints
from tests.backbones import clip, picture

ORDER = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def by_hand(queries, docs, keep, directions, scale=50.0, joint=True):
    """InfoNCE in Python loops; `keep(direction, i, column, j)` says which candidates count."""
    unit = torch.nn.functional.normalize
    queries, docs = unit(queries, dim=-1), [unit(doc, dim=-1) for doc in docs]
    size, losses = len(queries), []
    for i in range(size):
        terms = {}
        for direction in directions:
            anchor, side = direction.split("_to_")
            vector = queries[i] if anchor == "query" else docs[0][i]
            columns = [queries] if side == "query" else docs
            logits = [
                scale * vector @ candidates[j]
                for number, candidates in enumerate(columns)
                for j in range(size)
                if not (direction in ("query_to_query", "doc_to_doc") and i == j) and keep(direction, i, number, j)
            ]
            terms[direction] = torch.stack(logits) if logits else torch.full((1,), -math.inf)
        positive = scale * queries[i] @ docs[0][i]
        parts = [torch.cat(list(terms.values()))] if joint else list(terms.values())
        losses.append(-positive + sum(part.logsumexp(0) for part in parts) / len(parts))
    return torch.stack(losses).mean()


def mixed(model):
    """Four rows: row 2's positive is a duplicate of row 0's, row 3's is an image, row 1's negative an image."""
    return [
        model.preprocess(["query a", picture(28, 28, 1), "query a", "query d"]),
        model.preprocess(["same", "other", "same", picture(28, 28, 2)]),
        model.preprocess(["no", picture(28, 28, 3), "same", {"image": picture(28, 28, 4), "text": "and text"}]),
    ]


CONTENT = (("a", "image1", "a", "d"), ("same", "other", "same", "image2"), ("no", "image3", "same", "both"))


@pytest.mark.parametrize(
    "directions", [ORDER[:1], ("query_to_doc", "doc_to_query"), ORDER, ("query_to_doc", "doc_to_doc")], ids=str
)
@pytest.mark.parametrize("margin", [0.05, 0.0])
def test_loss_is_the_one_written_out(qwen, directions, margin):
    features = mixed(qwen)
    loss = BTokLoss(qwen, target="none", directions=directions, false_negative_margin=margin)
    embeddings = [qwen(dict(column))["sentence_embedding"] for column in features]
    similarity = {
        (a, b): torch.nn.functional.cosine_similarity(embeddings[a][:, None], embeddings[b][None], dim=-1)
        for a, b in itertools.product(range(3), repeat=2)
    }

    def keep(direction, i, number, j):
        anchor, side = direction.split("_to_")
        column = 0 if side == "query" else number + 1
        own = 0 if side == "query" else 1
        if (column, j) == (own, i):
            return True
        score = similarity[0 if anchor == "query" else 1, column][i, j]
        return CONTENT[column][j] != CONTENT[own][i] and score <= similarity[0, 1][i, i] + margin

    expected = by_hand(embeddings[0], embeddings[1:], keep, directions)
    plain = by_hand(embeddings[0], embeddings[1:], lambda *args: True, directions)
    found = loss([dict(column) for column in features])["ranking"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert abs(expected - plain) > 1e-4, "something was dropped"
    unfiltered = BTokLoss(qwen, target="none", directions=directions)([dict(column) for column in features])["ranking"]
    torch.testing.assert_close(unfiltered, plain, atol=1e-4, rtol=1e-5)


# Row 1 gives row 0's query a second answer, row 2 gives that answer a second query, and is row 3's hard negative.
PAIRS = (("q", "q", "r", "s"), ("first", "second", "second", "third"), ("no", "no", "no", "second"))


@pytest.mark.parametrize("directions", [ORDER[:1], ("query_to_doc", "doc_to_query"), ORDER], ids=str)
def test_second_answers_and_second_questions_are_no_negatives(qwen, directions):
    features = [qwen.preprocess(list(column)) for column in PAIRS]
    embeddings = [qwen(dict(column))["sentence_embedding"] for column in features]
    pairs = set(zip(*PAIRS[:2], strict=True))

    def keep(direction, i, number, j):
        column = 0 if direction.endswith("query") else number + 1
        candidate = PAIRS[column][j]
        if (column, j) in ((0, i), (1, i)):
            return True
        return ((PAIRS[0][i], candidate) if column else (candidate, PAIRS[1][i])) not in pairs

    # A margin that drops nothing by its score: cosine similarities differ by 2 at most.
    loss = BTokLoss(qwen, target="none", directions=directions, false_negative_margin=2.0)
    found = loss([dict(column) for column in features])["ranking"]
    torch.testing.assert_close(found, by_hand(embeddings[0], embeddings[1:], keep, directions), atol=1e-4, rtol=1e-5)
    plain = BTokLoss(qwen, target="none", directions=directions)([dict(column) for column in features])["ranking"]
    assert abs(found - plain) > 1e-4, "something was dropped"


def test_gradients_stay_finite_when_all_negatives_are_dropped(qwen):
    features = [qwen.preprocess(["a", "b"]), qwen.preprocess(["same", "same"])]
    parts = BTokLoss(qwen, target="none", false_negative_margin=0.0)(features)
    parts["ranking"].backward()
    assert parts["ranking"] == 0
    assert all(torch.isfinite(p.grad).all() for p in qwen.parameters() if p.grad is not None)


def test_hardness_weights_what_is_left(qwen):
    options = {"hardness_mode": "all_negatives", "hardness_strength": 5.0, "false_negative_margin": 0.0}
    parts = BTokLoss(qwen, target="none", **options)(mixed(qwen))
    parts["ranking"].backward()
    assert torch.isfinite(parts["ranking"])
    assert parts["ranking"] > BTokLoss(qwen, target="none", false_negative_margin=0.0)(mixed(qwen))["ranking"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_contents_are_equal_exactly_for_equal_rows(qwen, side):
    """Texts, pixels, grids and positions of media count; padding does not."""
    qwen.tokenizer.padding_side = side
    rows = [
        "a", "b", "ab", picture(28, 56, 1), picture(56, 28, 1), picture(28, 56, 2),
        {"image": picture(28, 56, 1), "text": "a"},
        {"image": [picture(28, 28, 1), picture(28, 28, 2)]}, {"image": [picture(28, 28, 2), picture(28, 28, 1)]},
        {"video": clip(4, 1)}, {"video": clip(4, 2)}, "",
    ]  # fmt: skip
    media = BTokLoss(qwen, target="none").reader.media_tokens
    once = content_fingerprints(qwen.preprocess([*rows, *rows]), media)
    assert len(set(once.tolist())) == len(rows)
    assert torch.equal(once[: len(rows)], once[len(rows) :])
    alone = torch.cat([content_fingerprints(qwen.preprocess([row]), media) for row in rows])
    assert torch.equal(alone, once[: len(rows)]), "not a matter of the batch"


@pytest.mark.parametrize("options", [{}, {"condensation_weight": 0}, {"route": "prefix"}], ids=str)
def test_duplicates_are_dropped_under_dropout_too(qwen, options):
    """Dropout gives equal rows other embeddings, which the forward pass writes beside their content."""
    qwen.add_adapter(btok_lora_config(qwen, dropout=0.5, init_lora_weights=False))
    loss = BTokLoss(qwen.train(), false_negative_margin=10.0, **options)
    dropped = []
    found = type(loss.filter).__call__

    def counted(self, a, b):
        similarities = found(self, a, b)
        dropped.append(similarities.isinf().nonzero().tolist())
        return similarities

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(loss.filter), "__call__", counted)
        loss([qwen.preprocess(["a", "b", "a", "c"]), qwen.preprocess(["one", "two", "three", "two"])])
    assert dropped == [[[0, 2], [1, 3], [2, 0], [3, 1]]], "equal queries, and equal positives"


def test_a_negative_margin_is_refused(qwen):
    with pytest.raises(ValueError, match="false_negative_margin must be at least 0"):
        BTokLoss(qwen, false_negative_margin=-0.1)


def test_model_card_names_the_similarity(qwen):
    config = BTokLoss(qwen, false_negative_margin=0.1).get_config_dict()
    assert config["similarity_fct"] == "cos_sim" and config["false_negative_margin"] == 0.1
    assert FilteredSimilarity(torch.matmul, 0.1).__name__ == "matmul"
