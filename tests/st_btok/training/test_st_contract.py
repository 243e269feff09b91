"""What sentence-transformers asks of a loss, and tests of its own: calls of the model, scaling, configurations."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import LlamaConfig, LlamaModel

from st_btok import BTokLoss, CachedBTokLoss
from st_btok.training import vocabulary_loss
from st_btok.training.buckets import call_cost, length_buckets, split_by_length
from tests.backbones import picture, total

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


def run(loss, features, factor=1.0):
    """Value and gradients of the scaled loss."""
    loss.model.zero_grad()
    value = factor * total(loss([dict(column) for column in features]))
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in loss.model.named_parameters() if p.grad is not None}


def assert_same(found, expected, factor=1.0):
    torch.testing.assert_close(found[0], factor * expected[0], atol=1e-5 * factor, rtol=1e-5)
    assert found[1].keys() == expected[1].keys() and len(expected[1]) > 10
    for name, grad in expected[1].items():
        size = factor * max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found[1][name] / size, factor * grad / size, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("mini_batch_size", [1, 4])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_cached_equals_plain_in_every_form_of_ranking(qwen, configuration, mini_batch_size):
    features, options = batch(qwen), CONFIGURATIONS[configuration]
    expected = run(BTokLoss(qwen, **options), features)
    assert_same(run(CachedBTokLoss(qwen, mini_batch_size=mini_batch_size, **options), features), expected)


@pytest.mark.parametrize("factor", [0.5, 1000.0])
@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_a_scaled_loss_is_scaled_in_both_parts(qwen, kind, factor):
    """As gradient accumulation and a GradScaler scale it."""
    features = batch(qwen)
    options = {"mini_batch_size": 2} if kind is CachedBTokLoss else {}
    expected = run(kind(qwen, **options), features)
    assert_same(run(kind(qwen, **options), features, factor), expected, factor)


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_backward_may_come_twice(qwen, kind):
    """A second backward pass through the same loss doubles the gradients, in GradCache's replay too."""
    features = batch(qwen, 3)
    expected = run(kind(qwen), features)[1]
    qwen.zero_grad()
    value = total(kind(qwen)([dict(column) for column in features]))
    value.backward(retain_graph=True)
    value.backward()
    for name, parameter in qwen.named_parameters():
        if parameter.grad is not None:
            size = max(1.0, expected[name].abs().max().item())
            torch.testing.assert_close(parameter.grad / size, 2 * expected[name] / size, atol=2e-5, rtol=0, msg=name)


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


def test_rows_of_different_length_run_in_buckets(qwen, monkeypatch):
    """Several calls instead of one, each as wide as its longest row, with targets or without; the same gradients."""
    texts = ["word " * (1 + 13 * i) for i in (3, 0, 7, 1, 6, 2, 5, 4)]
    features = [qwen.preprocess([*texts[:6], picture(28, 28, 1), picture(56, 56, 2)]), qwen.preprocess(texts)]
    loss = BTokLoss(qwen)
    sizes = calls(qwen, loss, features)
    assert sum(sizes) == 16 and len(sizes) >= 4
    found = run(loss, features)
    monkeypatch.setattr("st_btok.training.buckets.length_buckets", lambda lengths, cost: [list(range(len(lengths)))])
    assert calls(qwen, loss, features) == [8, 8]
    assert_same(found, run(loss, features))


def test_buckets_are_made_where_they_save_padding():
    assert length_buckets([], 100) == [[]]
    assert length_buckets([50] * 8, 100) == [list(range(8))], "nothing to save"
    assert length_buckets([10, 20, 12, 22], 100) == [[0, 1, 2, 3]], "less to save than a call costs"
    assert length_buckets([1000, 10, 1000, 10], 100) == [[1, 3], [0, 2]]
    assert length_buckets([100, 5000, 1200, 2500, 100, 5000, 1200, 2500], 100) == [[0, 4], [2, 6], [3, 7], [1, 5]]
    assert length_buckets([7, 900, 7, 7], 100) == [[0, 2, 3], [1]], "one long row"


def test_targets_in_the_graph_are_read_in_four_parts_at_most():
    """Each part keeps a gradient of the head until the backward pass."""
    mask = (torch.arange(2000) < 200 * torch.arange(1, 11)[:, None]).long()
    features = {"input_ids": mask, "attention_mask": mask}
    targets, none = [torch.ones(5)] * 10, [torch.ones(0)] * 10
    assert 1 < len(split_by_length(features, targets, {}, cost=1)) <= 4
    assert len(split_by_length(features, targets, {}, cost=1, apart=True)) == 10
    assert len(split_by_length(features, none, {}, cost=1)) == 10


@pytest.mark.parametrize("most", [None, 100, 20])
def test_no_split_into_neighbours_reads_less(most):
    """Against all splits of eight rows."""
    generator = torch.Generator().manual_seed(0)
    for cost in (0, 5, 40):
        lengths = torch.randint(1, 40, (8,), generator=generator).tolist()
        ordered, splits = sorted(lengths), []
        for cuts in range(2**7):
            ends = [i + 1 for i in range(7) if cuts >> i & 1] + [8]
            parts = [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            if most is None or all(len(part) == 1 or len(part) * part[-1] <= most for part in parts):
                splits.append(sum(len(part) * part[-1] + cost for part in parts))
        found = length_buckets(lengths, cost, most)
        assert sorted(row for rows in found for row in rows) == list(range(8))
        assert sum(len(rows) * max(lengths[row] for row in rows) + cost for rows in found) == min(splits)


def decoder(width, vocabulary=1000, device="cpu"):
    """A decoder of a width; on the meta device as on any that is no CPU."""
    with torch.device(device):
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=width, num_hidden_layers=2)
        return LlamaModel(config)


def test_a_call_costs_an_accelerator_more_than_short_rows_save():
    lengths = [8, 64] * 16
    assert len(length_buckets(lengths, call_cost(decoder(576)))) == 2
    assert len(length_buckets(lengths, call_cost(decoder(576, device="meta")))) == 1, "32 texts into a small decoder"
    pages = [100 * length for length in lengths]
    assert len(length_buckets(pages, call_cost(decoder(1536, device="meta")))) == 2, "pages into a larger one"
    assert call_cost(decoder(64)) > 2 * call_cost(decoder(576)), "the larger the model, the less a call weighs"


def test_a_trained_vocabulary_makes_calls_dear():
    """Each would give it a gradient of its own size; a frozen one, as under LoRA, gets none."""
    small, large = decoder(64), decoder(64, 50_000)
    assert call_cost(large) > 5 * call_cost(small)
    for model in (small, large):
        model.get_input_embeddings().requires_grad_(False)
    assert call_cost(large) == call_cost(small)


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
    chunked = vocabulary_loss._chunked

    def watched(states, *rest):
        read.append(len(states))
        return chunked(states, *rest)

    monkeypatch.setattr(vocabulary_loss, "_chunked", watched)
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
