"""The probes against their definitions, computed apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from recipes.study.probes import Conflict, information
from st_btok import BTokLoss

QUERIES = ["one", "two two", "three"]
POSITIVES = ["answer one", "the second", "number three"]


def test_conflict_is_the_cosine_of_both_gradients(btok_model):
    model = btok_model("llama").train()
    loss = BTokLoss(model, condensation_weight=0.7)
    probe = Conflict(loss, [QUERIES, POSITIVES], [0, 5])
    for step in (0, 1):
        probe.on_step_begin(None, SimpleNamespace(global_step=step), None)
    assert list(probe.found) == ["0"] and model.training
    assert all(p.grad is None for p in model.parameters()), "the training's own gradients stay empty"
    flat = []
    for name in ("ranking", "condensation"):
        model.eval().zero_grad()
        loss([model.preprocess(QUERIES), model.preprocess(POSITIVES)])[name].backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
        flat.append(torch.cat([grad.flatten() for grad in grads]))
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert probe.found["0"]["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    assert probe.found["0"]["ratio"] == pytest.approx(float(flat[1].norm() / flat[0].norm()), rel=1e-4)
    assert abs(float(cosine)) > 1e-4


def test_information_compares_the_own_targets_with_anothers(btok_model):
    loss = BTokLoss(btok_model("llama"))
    found = information(loss, [QUERIES, POSITIVES])
    model = loss.model
    for name, targets in (("own", POSITIVES), ("other", POSITIVES[1:] + POSITIVES[:1])):
        loss([model.preprocess(QUERIES), model.preprocess(targets)])
        assert found[name] == pytest.approx(float(loss.measured.nll), rel=1e-5)
    assert found["own"] != found["other"]
