"""Batch normalisation: statistics of the pretraining in every mode, on the family that has such layers."""

from __future__ import annotations

import copy

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from st_btok import BTokLoss, CachedBTokLoss, freeze_batch_norm
from tests.backbones import picture, published_btok, total

pytest.importorskip("timm")
PICTURES = [picture(64, 64, seed) for seed in range(4)]
CAPTIONS = ["a kite", "two boats", "the old lighthouse", "a red owl"]


@pytest.fixture
def model() -> SentenceTransformer:
    return published_btok("fast_vlm")[0]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def columns(model: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
    return [model.preprocess(PICTURES), model.preprocess(CAPTIONS)]


def test_training_leaves_the_statistics_as_they_are(model, tmp_path):
    """Built, and loaded by plain sentence-transformers, which knows nothing of it."""
    model.save_pretrained(str(tmp_path))
    for trained in (model, SentenceTransformer(str(tmp_path), device="cpu")):
        loss = BTokLoss(trained)
        before = statistics(trained)
        assert before
        trained.train()
        total(loss(columns(trained))).backward()
        after = statistics(trained)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_picture_is_seen_in_training_as_in_encoding(model):
    expected = model.encode(PICTURES, convert_to_tensor=True)
    model.train()
    found = model(model.preprocess(PICTURES))["sentence_embedding"]
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-4)


def test_mini_batches_give_the_gradients_of_the_whole_batch(model):
    """The tower's own gradients too: they are what batch statistics would change."""
    gradients = []
    for kind, options in ((BTokLoss, {}), (CachedBTokLoss, {"mini_batch_size": 2})):
        own = copy.deepcopy(model).train()
        total(kind(own, **options)(columns(own))).backward()
        gradients.append({name: value.grad for name, value in own.named_parameters() if value.grad is not None})
    whole, parts = gradients
    assert any("vision_tower" in name for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-4 * float(value.abs().max()) + 1e-7, rtol=1e-3)


def test_a_layer_in_training_mode_computes_what_it_does_in_evaluation():
    layer = nn.BatchNorm2d(3)
    for _ in range(2):
        freeze_batch_norm(layer)
    value = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.train()(value), copy.deepcopy(layer).eval()(value))
