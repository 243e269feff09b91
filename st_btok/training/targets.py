"""What is generated from what: the side to generate, and `[input][BToks][target]` rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from st_btok.training.content import Content
from st_btok.training.mask import BTOK, INPUT, TARGET

TargetSide = Literal["auto", "query", "positive", "both", "none"]
TARGET_SIDES = ("auto", "query", "positive", "both", "none")


def choose_targets(
    query: list[Content], positive: list[Content], target: TargetSide, end: int, max_target_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """For each row, ids that its query has to generate, and ids that its positive has to; empty for nothing.

    `auto`: the side with text is generated from the side with media; with text on both sides, the positive from the
    query; without any text, nothing. `end` closes every target. A longer one than `max_target_tokens` is cut, not
    closed.
    """
    from_query, from_positive = [], []
    empty = torch.zeros(0, dtype=torch.long)
    for q, p in zip(query, positive, strict=True):
        side = target
        if side == "auto":
            if len(q.text) and p.has_media and not q.has_media:
                side = "query"
            elif len(p.text):
                side = "positive"
            else:
                side = "query" if len(q.text) and p.has_media else "none"
        closed = {name: _close(content.text, end, max_target_tokens) for name, content in (("q", q), ("p", p))}
        from_query.append(closed["p"] if side in ("positive", "both") else empty)
        from_positive.append(closed["q"] if side in ("query", "both") else empty)
    return from_query, from_positive


def _close(text: Tensor, end: int, max_target_tokens: int) -> Tensor:
    return text if not len(text) else torch.cat([text, text.new_tensor([end])])[:max_target_tokens]


@dataclass(frozen=True)
class JointBatch:
    """Rows `[input][BToks][target]`, padded on the right."""

    features: dict[str, Any]  # model inputs; per-token tensors have shape (B, T + N)
    segments: Tensor  # (B, T + N) `INPUT`, `BTOK` or `TARGET`
    positions: Tensor  # (B, T) where each original position stands in the joint rows
    predictors: Tensor  # (M, 2) row and position whose state predicts each target token
    labels: Tensor  # (M,) the target tokens


def join_targets(features: dict[str, Any], targets: list[Tensor], btoks: list[int]) -> JointBatch:
    """Put each row's target directly behind its bottleneck tokens.

    Positions then simply continue, and since every backbone here is causal, the states of input and BToks are what
    they are without the target. The last BTok predicts the first target token. Every 2-D feature of the shape of
    `input_ids` counts as per-token; `btoks` are those that the target reads: all K, or the first of them.
    """
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    device, (rows, width) = ids.device, ids.shape
    counts = [len(target) for target in targets]
    labels = torch.cat(targets).to(device)  # (M,)
    # 1. Where everything stands: a row's real tokens in order, then its target, then padding.
    lengths, sizes = mask.sum(1), torch.tensor(counts, device=device)  # (B,)
    total = int((lengths + sizes).max())  # the only point where the host waits for the device
    columns = torch.arange(total, device=device)
    is_input = columns < lengths[:, None]  # (B, T + N)
    is_target = ~is_input & (columns < (lengths + sizes)[:, None])
    # 2. Features that have an entry per token follow their tokens; 0 at targets and padding.
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # real tokens first, in order
    source = order.gather(1, columns.clamp(max=width - 1).expand(rows, -1)) if rows else order
    joint: dict[str, Any] = {}
    for key, value in features.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            joint[key] = torch.where(
                is_input, value.gather(1, source), torch.zeros((), dtype=value.dtype, device=device)
            )
        else:
            joint[key] = value
    joint["input_ids"] = joint["input_ids"].masked_scatter(is_target, labels)
    joint["attention_mask"] = (is_input | is_target).to(features["attention_mask"].dtype)
    # 3. What each position is.
    is_btok = torch.isin(joint["input_ids"], torch.tensor(btoks, device=device)) & is_input
    segments = torch.where(is_btok, BTOK, torch.where(is_target, TARGET, INPUT))
    # 4. Each target token is predicted by the token before it; a row's first one by the last BTok that the target
    #    reads, even if another BTok stands between them.
    rows_of = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)]).long().to(device)  # (M,)
    places = torch.tensor([place for count in counts for place in range(count)]).long().to(device)
    last = torch.where(is_btok, columns, -1).amax(1)  # (B,)
    predictors = torch.stack([rows_of, torch.where(places > 0, lengths[rows_of] + places - 1, last[rows_of])], 1)
    return JointBatch(joint, segments, (mask.cumsum(1) - 1).clamp(min=0), predictors, labels)
