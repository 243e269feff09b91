"""One training step of a loss on every kind of input, and its comparison with another: value and gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from st_btok.training.content import carry_content
from tests.backbones import inputs, picture, takes, total


@dataclass
class Step:
    """What one step of a loss gave: its parts, their sum, the target tokens, and every gradient by name."""

    parts: dict[str, torch.Tensor]
    total: torch.Tensor
    tokens: torch.Tensor | None
    grads: dict[str, torch.Tensor]


def columns(model, family, queries=None, positives=None):
    """Queries of every kind that a family takes, texts of growing length (one picture) as positives, one negative."""
    carry_content(model[0])  # the losses are made later
    queries = queries or inputs(family)[:-1]
    if positives is None:
        positives = [f"target {i} " + "x" * i for i in range(len(queries))]
        if takes(family, "image"):
            positives[1] = picture(28, 28, 9)
    return [model.preprocess(rows) for rows in (queries, positives, [f"no {i}" for i in range(len(queries))])]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_of(loss):
    """The `BTokLoss` of a loss."""
    return getattr(loss, "loss", loss)


def run(loss: Any, features: list[dict], factor: float = 1.0, context: AbstractContextManager | None = None) -> Step:
    """One step of the scaled loss from empty gradients; dropout draws the same every time."""
    loss.model.zero_grad()
    torch.manual_seed(3)
    with context or nullcontext():
        parts = loss([dict(column) for column in features], None)
    value = factor * total(parts)
    value.backward()
    measured = getattr(plain_of(loss), "measured", None)
    parts = {name: part.detach() for name, part in parts.items()} if isinstance(parts, dict) else {}
    return Step(parts, value.detach().float(), measured and measured.tokens, gradients(loss.model))


def assert_same_gradients(found, expected, atol=1e-5, factor=1.0, least=10):
    """Every gradient, relative to its largest value where that is above 1."""
    assert found.keys() == expected.keys() and len(expected) >= least
    assert sum(grad.abs().sum() for grad in expected.values()) > 1e-3, "vacuous"
    for name, grad in expected.items():
        size = factor * max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found[name] / size, factor * grad / size, atol=atol, rtol=0, msg=name)


def assert_same(found: Step, expected: Step, atol: float = 1e-5, factor: float = 1.0) -> None:
    """`found` is `factor` times `expected`, parts and gradients; as many target tokens."""
    torch.testing.assert_close(found.total, factor * expected.total, atol=1e-5 * factor, rtol=1e-5)
    for name in found.parts.keys() & expected.parts.keys():
        torch.testing.assert_close(found.parts[name], expected.parts[name], atol=atol, rtol=1e-5)
    assert found.tokens is None or expected.tokens is None or found.tokens == expected.tokens
    assert_same_gradients(found.grads, expected.grads, atol, factor)
