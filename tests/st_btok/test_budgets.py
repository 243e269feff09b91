"""Budgets: k tokens read at encode time are the first k of K tokens that were trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

from st_btok import BTokLoss, build_model, read_budget
from st_btok.model_parts import find_btoks
from st_btok.pooling import select_btoks
from tests.backbones import build, inputs


def first_states(model, samples, budget):
    """Normalised mean of the first k states of all K, one input at a time."""
    _, ids = find_btoks(model)
    rows = []
    for sample in samples:
        features = model.preprocess([sample])
        with torch.no_grad():
            states = model[0](dict(features))["token_embeddings"]
        rows.append(select_btoks(states, features["input_ids"], features["attention_mask"], ids)[0, :budget].mean(0))
    return F.normalize(torch.stack(rows), dim=-1).numpy()


def test_reading_k_tokens_is_pooling_the_first_k(model, family, tmp_path):
    samples = inputs(family)[:-1]
    for budget in (1, 2, 4):
        small = read_budget(model, budget)
        expected = first_states(model, samples, budget)
        np.testing.assert_allclose(small.encode(samples), expected, atol=1e-5)
        assert (
            small.preprocess(["a"])["input_ids"].shape[1] == model.preprocess(["a"])["input_ids"].shape[1] - 4 + budget
        )
    assert np.abs(first_states(model, samples, 1) - first_states(model, samples, 4)).max() > 1e-3
    small = read_budget(model, 2)
    small.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(loaded.encode(samples), small.encode(samples), atol=1e-6)
    np.testing.assert_allclose(model.encode(samples), first_states(model, samples, 4), atol=1e-5)


def test_text_without_the_template_is_framed_for_the_budget():
    """As an engine tokenises a bare `"input"`: its ids are those of the prompt, with k BToks and not with all."""
    model = build_model(*build("llama")[:1], processor=build("llama")[1], device="cpu")
    for budget in (1, 2, 4):
        small = read_budget(model, budget)
        bare = small.tokenizer("Which town lies by the sea?")["input_ids"]
        assert bare == small.preprocess(["Which town lies by the sea?"])["input_ids"][0].tolist()


def test_ranking_is_the_mean_over_budgets(qwen):
    features = [qwen.preprocess(["a", "b", "c"]), qwen.preprocess(["one", "two", "three"])]
    parts = BTokLoss(qwen, btok_budgets=(4, 1, 2))(features)
    single = BTokLoss(qwen, target="none")
    expected = []
    for budget in (1, 2, 4):
        columns = [
            torch.tensor(first_states(qwen, texts, budget)) for texts in (["a", "b", "c"], ["one", "two", "three"])
        ]
        expected.append(single.ranking.compute_loss_from_embeddings(columns, None))
    torch.testing.assert_close(parts["ranking"], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)
    whole = BTokLoss(qwen)(features)
    torch.testing.assert_close(parts["condensation"], whole["condensation"], msg="the target reads all K tokens")
    assert BTokLoss(qwen, btok_budgets=(1, 4)).get_config_dict()["btok_budgets"] == (4, 1)


def test_budgets_out_of_range_are_refused(qwen):
    for budgets in ((1, 2), (0, 4), (1, 8), ()):
        with pytest.raises(ValueError, match="between 1 and K = 4"):
            BTokLoss(qwen, btok_budgets=budgets)
    for budget in (0, 5):
        with pytest.raises(ValueError, match=f"num_btoks must lie between 1 and K = 4, got {budget}"):
            read_budget(qwen, budget)


def test_a_read_budget_is_not_for_training(qwen):
    with pytest.raises(ValueError, match=r"appends 2: is it from read_budget.*btok_budgets=\(2, 4\)"):
        BTokLoss(read_budget(qwen, 2))
    BTokLoss(read_budget(qwen, 4))


def test_other_readouts_have_no_budgets():
    backbone, processor = build("llama")
    model = build_model(backbone, processor=processor, readout="last", device="cpu")
    with pytest.raises(ValueError, match='readout="mean"'):
        BTokLoss(model, btok_budgets=(1, 4))
