"""What is counted is what torch dispatches; the losses' own host reads do not grow with the rows."""

from __future__ import annotations

import pytest
import torch

from recipes.bench.operations import Count, count, table, ways
from recipes.bench.settings import OperationsConfig
from tests.backbones import picture


def test_host_reads_are_seen():
    values = torch.arange(6.0)
    with Count() as found:
        values.sum().item()
        values.nonzero()
        values[values > 2]
        values[torch.tensor([1, 2])]
        _ = bool(values.any())
    assert found.host_reads == 4 and found.operations >= 8


@pytest.mark.parametrize("cached", [False, True])
def test_no_host_read_of_the_losses_grows_with_the_rows(btok_model, cached):
    """Against ranking alone on the same rows; of a mini-batch there may be some, of a row none."""
    model = btok_model("qwen2_vl").train()
    found = {}
    for size in (2, 4, 8):
        columns = [model.preprocess([picture(28, 28, i) for i in range(size)]), model.preprocess(["one two"] * size)]
        losses = ways(model, mini_batch_size=size)
        names = ("CachedMultipleNegativesRankingLoss", "CachedBTokLoss") if cached else list(losses)[0:3:2]
        alone, ours = (count(losses[name], columns) for name in names)
        found[size] = ours.host_reads - alone.host_reads
    assert found[2] == found[4] == found[8]


def test_the_table_has_a_row_for_every_loss():
    text = table(OperationsConfig(batches="2", mini_batch_size=1))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "BTok" in line]
    assert rows == [
        "BTokLoss without condensation",
        "BTokLoss",
        "CachedBTokLoss without condensation",
        "CachedBTokLoss",
    ]
