"""What is counted is what torch dispatches."""

from __future__ import annotations

import torch

from recipes.bench.operations import Count, table
from recipes.bench.settings import OperationsConfig


def test_host_reads_are_seen():
    values = torch.arange(6.0)
    with Count() as found:
        values.sum().item()
        values.nonzero()
        values[values > 2]
        values[torch.tensor([1, 2])]
        _ = bool(values.any())
    assert found.host_reads == 4 and found.operations >= 8


def test_the_table_has_a_row_for_every_loss():
    text = table(OperationsConfig(batches="2", mini_batch_size=1))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "BTok" in line]
    assert rows == [
        "BTokLoss without condensation",
        "BTokLoss",
        "CachedBTokLoss without condensation",
        "CachedBTokLoss",
    ]
