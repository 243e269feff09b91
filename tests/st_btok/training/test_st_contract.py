"""What sentence-transformers asks of a loss, and tests of its own: calls of the model, scaling, configurations."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_btok import BTokLoss, CachedBTokLoss
from st_btok.training.vocabulary_loss import sum_with_gradients
from tests.backbones import picture, total
from tests.losses import assert_same, assert_same_gradients, gradients, run

# The forms of in-batch ranking that MultipleNegativesRankingLoss is used in.
BOTH = ("query_to_doc", "doc_to_query")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CONFIGURATIONS = {
    "one direction": {},
    "both directions": {"directions": BOTH, "partition_mode": "per_direction"},
    "both directions, one softmax": {"directions": BOTH, "partition_mode": "joint"},
    "all directions, one softmax": {"directions": ALL, "partition_mode": "joint"},
    "hard negatives weigh more": {"hardness_mode": "hard_negatives", "hardness_strength": 3.0},
}


def batch(model, size=6):
    """Pictures and texts, targets of different lengths, and one negative each."""
    queries = [picture(28, 28, i) if i % 2 else f"query {i}" for i in range(size)]
    positives = [f"positive {i} " + "word " * i for i in range(size)]
    return [model.preprocess(rows) for rows in (queries, positives, [f"negative {i}" for i in range(size)])]


@pytest.mark.parametrize("mini_batch_size", [1, 4])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_cached_equals_plain_in_every_form_of_ranking(qwen, configuration, mini_batch_size):
    features, options = batch(qwen), CONFIGURATIONS[configuration]
    expected = run(BTokLoss(qwen, **options), features)
    found = run(CachedBTokLoss(qwen, mini_batch_size=mini_batch_size, **options), features)
    assert_same(found, expected, atol=2e-5)


@pytest.mark.parametrize("factor", [0.5, 1000.0])
@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_a_scaled_loss_is_scaled_in_both_parts(qwen, kind, factor):
    """As gradient accumulation and a GradScaler scale it."""
    features = batch(qwen)
    options = {"mini_batch_size": 2} if kind is CachedBTokLoss else {}
    expected = run(kind(qwen, **options), features)
    assert_same(run(kind(qwen, **options), features, factor), expected, 2e-5, factor)


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_backward_may_come_twice(qwen, kind):
    """A second backward pass through the same loss doubles the gradients, in GradCache's replay too."""
    features = batch(qwen, 3)
    expected = run(kind(qwen), features).grads
    qwen.zero_grad()
    value = total(kind(qwen)([dict(column) for column in features]))
    value.backward(retain_graph=True)
    value.backward()
    assert_same_gradients(gradients(qwen), expected, atol=4e-5, factor=2)


def calls(model, loss, features):
    """How many calls of the model one loss takes."""
    seen = []
    handle = model[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0]["input_ids"])))
    loss([dict(column) for column in features], None)
    handle.remove()
    return seen


@pytest.mark.parametrize("negatives", [0, 1, 5])
def test_columns_without_targets_share_one_call(qwen, negatives):
    """1 + 1 + 5 columns are 2 calls in MNRL; here the column with targets, and all others together."""
    texts = ["one", "two", "three"]
    features = [qwen.preprocess(texts) for _ in range(2 + negatives)]
    plain = calls(qwen, MultipleNegativesRankingLoss(qwen), features)
    assert calls(qwen, BTokLoss(qwen, target="none"), features) == plain
    assert calls(qwen, BTokLoss(qwen), features) == plain == [3, 3 * (1 + negatives)]
    both = calls(qwen, BTokLoss(qwen, target="both"), features)
    assert both == ([3, 3, 3 * negatives] if negatives else [3, 3])


def test_merged_columns_change_neither_value_nor_gradients(qwen):
    features = [qwen.preprocess([f"{word} {i}" * (i + 1) for i in range(3)]) for word in ("q", "p", "n", "m")]
    loss = BTokLoss(qwen)
    assert len(calls(qwen, loss, features)) == 2
    expected = run(CachedBTokLoss(qwen, mini_batch_size=3), features)  # one call a column
    assert_same(run(loss, features), expected)


def test_rows_of_different_length_run_in_parts(qwen, monkeypatch):
    """Several calls instead of one, each as wide as its longest row, with targets or without; the same gradients."""
    texts = ["word " * (1 + 13 * i) for i in (3, 0, 7, 1, 6, 2, 5, 4)]
    features = [qwen.preprocess([*texts[:6], picture(28, 28, 1), picture(56, 56, 2)]), qwen.preprocess(texts)]
    loss = BTokLoss(qwen)
    sizes = calls(qwen, loss, features)
    assert sum(sizes) == 16 and len(sizes) >= 4
    found = run(loss, features)
    monkeypatch.setattr("st_btok.training.loss.split_by_length", lambda column, media_tokens, cost: [column])
    assert calls(qwen, loss, features) == [8, 8]
    assert_same(found, run(loss, features))


def test_the_cached_loss_reads_rows_of_similar_length_together(qwen):
    """The positions of all mini-batches, padding included, are far fewer than in the order of the batch."""
    lengths = [1, 60, 1, 60, 1, 60, 1, 60]
    features = [qwen.preprocess([f"{i} " + "w" * n for i, n in enumerate(lengths)]), qwen.preprocess(["a"] * 8)]
    widths = []
    qwen[0].register_forward_pre_hook(lambda module, args: widths.append(args[0]["input_ids"].numel()))
    with torch.no_grad():
        CachedBTokLoss(qwen, mini_batch_size=2, target="none")([dict(column) for column in features])
    own = features[0]["attention_mask"].sum(1).tolist()
    assert sum(widths[:4]) <= sum(own) + 16 < 8 * max(own) - 100


@pytest.mark.parametrize("train_head", [False, True])
def test_the_vocabulary_is_read_once_under_gradcache(qwen, monkeypatch, train_head):
    """As often as by the plain loss, whether the head trains or not, and with the same gradients."""
    read = []

    def watched(states, *rest, **options):
        read.append(len(states))
        return sum_with_gradients(states, *rest, **options)

    monkeypatch.setattr("st_btok.training.vocabulary_loss.sum_with_gradients", watched)
    qwen[0].model.get_input_embeddings().requires_grad_(train_head)
    features = batch(qwen)
    expected, plain = run(BTokLoss(qwen), features), sum(read)
    read.clear()
    assert_same(run(CachedBTokLoss(qwen, mini_batch_size=2), features), expected)
    assert sum(read) == plain > 0


@pytest.mark.parametrize("make", [BTokLoss, lambda model: CachedBTokLoss(model, mini_batch_size=2)])
def test_a_step_does_not_list_the_vocabulary(qwen, monkeypatch, make):
    """It takes 26 ms at 49,152 tokens, and each pass through the model asks which tokens are the BToks."""
    loss, listed = make(qwen), []
    monkeypatch.setattr(type(qwen.tokenizer), "get_vocab", lambda self: listed.append(1) or {})
    run(loss, batch(qwen))
    assert not listed
