"""`BTokLoss` = one straight training step (invariant 16), in value and gradients, on every family with a mask."""

from __future__ import annotations

import pytest
import torch

from st_btok import BTokLoss
from st_btok.training.reference import training_step
from tests.backbones import inputs, total


def filled(targets, batch_size):
    """A list of ids for every row of every column, as the reference wants it."""
    nothing = [torch.zeros(0, dtype=torch.long)] * batch_size
    return [nothing if column is None else column for column in targets]


@pytest.mark.parametrize("options", [{}, {"target": "both", "condensation_weight": 3.0, "scale": 20.0}], ids=str)
def test_the_loss_is_the_straight_step(model, family, options):
    """All kinds of input that a family takes, rows with and without a target, a column of negatives."""
    loss = BTokLoss(model, **options)
    if loss.route != "attention":
        pytest.skip("the mask does not cut the target off: there is no attention route")
    queries = inputs(family)[:-1]
    positives = [f"target {i} " + "x" * i for i in range(len(queries))]
    positives[1] = queries[-1]  # its text, or no target where it is a picture alone
    columns = [model.preprocess(rows) for rows in (queries, positives, [f"no {i}" for i in range(len(queries))])]
    targets = filled(loss.targets(columns), len(queries))
    assert sum(map(len, targets[0])) > 10
    weights = {key: value for key, value in options.items() if key != "target"}

    expected = training_step(model, columns, targets, **weights)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = total(loss([dict(column) for column in columns]))
    found.backward()

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in wanted or not wanted[name].any(), name
            continue
        size = max(1.0, wanted[name].abs().max().item())
        torch.testing.assert_close(parameter.grad / size, wanted[name] / size, atol=1e-5, rtol=0, msg=name)
        compared += bool(wanted[name].any())
    assert compared > 10, "vacuous"
