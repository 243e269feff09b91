"""Operations that a training step starts, and times that the host waits for the device, without one.

    python -m recipes.bench operations

On an accelerator a step is bound by kernel starts and by host reads: every `.item()`, `.nonzero()` and boolean index
waits until all that was started has run. Both are the same on the CPU, so they are counted there: operations that
torch dispatches in the forward and the backward pass, and among them those that the host has to read. The backbone is
the shipped Qwen2-VL, on (image of a word, "colour word") pairs. Every column is one call, as an accelerator's cost of
a call has it for a backbone of this size; GradCache runs mini-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import markdown
from recipes.bench.settings import BACKBONE, OperationsConfig
from recipes.bench.step import OneWidth, total
from recipes.toy import pairs
from st_btok import CachedBTokLoss, build_model

# Operations whose result the host needs before it can go on.
_HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Count(TorchDispatchMode):
    """Counts what is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.host_reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        name = function.overloadpacket.__name__
        self.operations += 1
        boolean = name in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.host_reads += boolean or name in _HOST_READS
        return function(*args, **(kwargs or {}))


def ways(model: SentenceTransformer, mini_batch_size: int) -> dict[str, Callable[[list[Any]], torch.Tensor]]:
    """What turns the columns into the loss, by the name of its row; ranking alone comes before what it is beside."""
    size = {"mini_batch_size": mini_batch_size}
    plain = MultipleNegativesRankingLoss(model, scale=50.0)
    cached = CachedMultipleNegativesRankingLoss(model, scale=50.0, **size)
    ours = {
        "BTokLoss without condensation": OneWidth(model, condensation_weight=0.0),
        "BTokLoss": OneWidth(model),
        "CachedBTokLoss without condensation": CachedBTokLoss(model, condensation_weight=0.0, **size),
        "CachedBTokLoss": CachedBTokLoss(model, **size),
    }
    steps = {name: lambda columns, loss=loss: total(loss(columns)) for name, loss in ours.items()}
    names = list(steps)
    return {
        "MultipleNegativesRankingLoss": lambda columns: plain(columns, None),
        **{name: steps[name] for name in names[:2]},
        "CachedMultipleNegativesRankingLoss": lambda columns: cached(columns, None),
        **{name: steps[name] for name in names[2:]},
    }


def count(step: Callable[[list[Any]], torch.Tensor], columns: list[dict[str, Any]]) -> Count:
    """One step, forward and backward, after one that is not counted."""
    step([dict(column) for column in columns]).backward()
    with Count() as found:
        step([dict(column) for column in columns]).backward()
    return found


def table(config: OperationsConfig) -> str:
    """Markdown: counts by loss and batch size, with ratios to ranking alone."""
    model = build_model(BACKBONE, device="cpu").train()
    sizes = [int(size) for size in config.batches.split(",")]
    head = ["loss", *(f"{what}, {size} pairs" for size in sizes for what in ("operations", "host reads"))]
    rows = []
    steps = ways(model, config.mini_batch_size)
    columns = {}
    for size in sizes:  # behind the losses: from then on features carry what their rows generate
        images, texts = pairs.captions("train", size, seed=0)
        columns[size] = [model.preprocess(images), model.preprocess(texts)]
    base: dict[int, Count] = {}
    for name, step in steps.items():
        found = {size: count(step, columns[size]) for size in sizes}
        if "BTok" not in name:
            base = found
        cells = []
        for size, counted in found.items():
            ratio = counted.operations / base[size].operations
            cells += [f"{counted.operations:,} ({ratio:.2f})", f"{counted.host_reads:,}"]
        rows.append([name, *cells])
    title = f"Shipped Qwen2-VL, mini-batches of {config.mini_batch_size} rows; forward and backward."
    return f"{title}\n\n{markdown.table(head, rows, numbers=True)}\n"


def main(config: OperationsConfig) -> None:
    """Count and write the table."""
    text = table(config)
    Path(config.output).write_text(text)
    print(text)
