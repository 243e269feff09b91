"""Failures that users of other embedders reported, as training with the BTok losses would show them.

Each test is named after the report. Others live where their module is tested: adapters that lose weights on reload
(colpali 0.3.14, sentence-transformers #3052) in `test_adapters`, gathered negatives that are misaligned
(sentence-transformers #3453) in `test_distributed`, batch size and padding side of `encode` in `test_model`.
"""

from __future__ import annotations

import gc

import pytest
import torch

from st_btok import BTokLoss, CachedBTokLoss
from tests.backbones import picture, total
from tests.losses import assert_same_gradients, gradients

LOSSES = {"plain": BTokLoss, "cached": lambda model, **options: CachedBTokLoss(model, mini_batch_size=2, **options)}


def columns(model):
    queries = [picture(28, 56, 1), {"image": [picture(28, 28, 2), picture(56, 28, 3)], "text": "what?"}, "a text"]
    return [model.preprocess(queries), model.preprocess(["red", "a longer target", picture(28, 28, 4)])]


@pytest.mark.parametrize("kind", LOSSES)
def test_vlm2vec_18_padding_side_changes_the_result(qwen, kind):
    """Value and gradients of training, not only of encoding."""
    found = []
    for side in ("left", "right"):
        qwen.tokenizer.padding_side = side
        qwen.zero_grad()
        parts = LOSSES[kind](qwen)(columns(qwen))
        total(parts).backward()
        found.append((total(parts).item(), gradients(qwen)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_same_gradients(found[0][1], found[1][1], atol=2e-5)


def test_sentence_transformers_3862_cached_gradients_silently_wrong(qwen):
    """A scaled loss (accumulation, fp16) and a second forward pass before the first backward pass."""
    loss, other = LOSSES["cached"](qwen), [qwen.preprocess(["x", "y"]), qwen.preprocess(["one", "two"])]
    qwen.zero_grad()
    total(BTokLoss(qwen)(columns(qwen))).backward()
    wanted = gradients(qwen)
    qwen.zero_grad()
    value = total(loss(columns(qwen)))
    loss(other)
    (0.25 * value).backward()
    assert_same_gradients(gradients(qwen), wanted, atol=2e-5, factor=0.25)


@pytest.mark.parametrize("kind", LOSSES)
def test_vlm2vec_67_loss_collapses_to_zero_with_small_batches(qwen, kind):
    """One pair has no negatives: ranking is 0 and teaches nothing. The condensation loss still does."""
    pair = [qwen.preprocess([picture(28, 28, 1)]), qwen.preprocess(["red"])]
    parts = LOSSES[kind](qwen)(pair)
    assert parts["ranking"] == 0 and parts["condensation"] > 0.1
    total(parts).backward()
    assert sum(g.abs().sum() for g in gradients(qwen).values()) > 1


@pytest.mark.parametrize("kind", LOSSES)
def test_vlm2vec_66_memory_creeps_up_over_the_steps(qwen, kind):
    """Nothing of a step outlives it: graphs, caches, features."""

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    loss, counts = LOSSES[kind](qwen, route="kv"), []
    for _ in range(5):
        total(loss(columns(qwen))).backward()
        counts.append(alive())
    assert counts[2:] == [counts[2]] * 3, counts
