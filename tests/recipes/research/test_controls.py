"""Controls of the method against hand computation: no mask, a warm-up, a further token, every text from itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recipes.research.controls import CachedControlLoss, ControlLoss, btok_loss
from st_btok import BTokLoss, CachedBTokLoss
from st_btok.model_parts import find_btoks
from st_btok.training.splitting import Part
from st_btok.training.targets import join_targets
from tests.losses import assert_same_gradients, columns, gradients, plain_of, run

LOSSES = pytest.mark.parametrize("loss_class", [ControlLoss, CachedControlLoss])


def test_without_the_mask_it_is_the_plain_likelihood_of_the_joint_row(qwen):
    """Independent truth: the bare backbone on `[input][BToks][target]`, ordinary causal attention, all logits."""
    transformer, ids = find_btoks(qwen)
    features = qwen.preprocess(["a text", "another text"])
    targets = [torch.tensor(qwen.tokenizer(text)["input_ids"]) for text in ("red kite", "a blue kite")]
    with torch.no_grad():
        plain = ControlLoss(qwen, route="unmasked").embed(Part(dict(features), targets))
        masked = BTokLoss(qwen).embed(Part(dict(features), targets))
        joint = join_targets(features, targets, ids)
        states = transformer.model(
            input_ids=joint.features["input_ids"], attention_mask=joint.features["attention_mask"]
        ).last_hidden_state
        rows, positions = joint.predictors.T
        logits = states[rows, positions] @ transformer.model.get_input_embeddings().weight.T
        nll = F.cross_entropy(logits, joint.labels, reduction="sum")
    torch.testing.assert_close(plain.nll, nll, rtol=1e-5, atol=1e-5)
    assert abs(plain.nll - masked.nll) > 1e-3, "the mask makes a difference"
    torch.testing.assert_close(plain.embedding, masked.embedding, rtol=0, atol=1e-6)
    assert ControlLoss(qwen, route="unmasked").get_config_dict()["route"] == "unmasked"


@LOSSES
def test_a_warmup_trains_the_condensation_loss_alone(qwen, loss_class):
    """Value and gradients of the first steps are those of one part; afterwards those of both."""
    features = columns(qwen, "qwen2_vl")
    loss = loss_class(qwen, condensation_weight=0.5, condensation_warmup=3)
    both = run(BTokLoss(qwen, condensation_weight=0.5), features)
    qwen.zero_grad()
    BTokLoss(qwen, condensation_weight=0.5)([dict(column) for column in features])["condensation"].backward()
    alone = gradients(qwen)
    for step, value, wanted in ((2, both.parts["condensation"], alone), (3, both.total, both.grads)):
        loss.schedule.step = step
        found = run(loss, features)
        torch.testing.assert_close(found.total, value, atol=1e-5, rtol=1e-5)
        kept = {name: grad for name, grad in found.grads.items() if name in wanted}
        assert_same_gradients(kept, wanted, atol=2e-5)
    loss.schedule.step = None
    with pytest.raises(ValueError, match="needs the step"):
        loss(features)


@LOSSES
def test_a_further_token_ranks_alone(qwen, loss_class):
    """What the first three of four tokens predict does not depend on the fourth's row."""
    features = columns(qwen, "qwen2_vl")
    head = qwen[0].model.get_input_embeddings().weight.detach().clone()  # apart, so that only the input changes
    values = []
    for _ in range(2):
        loss = loss_class(qwen, condensation_btoks=3, lm_head=head)
        values.append(loss([dict(column) for column in features]))
        with torch.no_grad():
            qwen[0].model.get_input_embeddings().weight[plain_of(loss).btoks[3]] += 1
    torch.testing.assert_close(values[0]["condensation"], values[1]["condensation"], atol=1e-6, rtol=0)
    assert abs(values[0]["ranking"] - values[1]["ranking"]) > 1e-3
    whole = loss_class(qwen, lm_head=head)([dict(column) for column in features])["condensation"]
    assert abs(values[0]["condensation"] - whole) > 1e-3


def test_every_text_from_itself(qwen):
    features = [qwen.preprocess(["query", "b"]), qwen.preprocess(["pos", "c"])]
    crossed, own = BTokLoss(qwen, target="both").targets(features), ControlLoss(qwen, target="self").targets(features)
    assert all(map(torch.equal, own[0], crossed[1])) and all(map(torch.equal, own[1], crossed[0]))


def test_only_a_control_is_one(qwen):
    assert type(btok_loss(qwen, condensation_weight=0.5)) is BTokLoss
    assert type(btok_loss(qwen, mini_batch_size=2)) is CachedBTokLoss
    assert type(btok_loss(qwen, mini_batch_size=2, condensation_warmup=3)) is CachedControlLoss


@pytest.mark.parametrize(
    "options", [{"condensation_btoks": 5}, {"condensation_btoks": 0}, {"condensation_warmup": -1}]
)
def test_numbers_out_of_range_are_refused(qwen, options):
    with pytest.raises(ValueError, match="must be"):
        ControlLoss(qwen, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_that_targets_do_not_read_get_no_gradient_from_them(qwen, side):
    qwen.tokenizer.padding_side = side
    features = columns(qwen, "qwen2_vl")
    rows = qwen[0].model.get_input_embeddings().weight
    head = rows.detach().clone()  # apart, so that the rows' gradient is that of the inputs alone
    found = {}
    for route in ("attention", "kv", "prefix"):
        qwen.zero_grad()
        loss = ControlLoss(qwen, route=route, condensation_btoks=2, lm_head=head)
        found[route] = loss([dict(column) for column in features])["condensation"]
        found[route].backward()
        assert (rows.grad[loss.btoks[:2]].abs().sum(1) > 0).all()
        assert rows.grad[loss.btoks[2:]].abs().max() == 0
    torch.testing.assert_close(found["kv"], found["attention"], atol=1e-5, rtol=1e-5)
