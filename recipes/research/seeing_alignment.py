"""The training of `seeing.py`'s connector: a picture's bottleneck tokens are to say what its caption's say.

The decoder stays frozen, and so do the captions' embeddings, which are computed once: with p a picture's embedding
(the mean over the states of " The topic is the" behind it) and c_j those of all N training captions,

    loss = (InfoNCE(p_i -> c_1..N) + InfoNCE(c_i -> p_1..B)) / 2 + nats a token of some captions

so that the search learns from every caption at every step, and the decoder can write what it sees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.research.seeing_connector import PROMPT, Reader, measure, save_connector
from recipes.research.seeing_pictures import Captioned, topic

BATCH_SIZE, RATE, TEMPERATURE = 48, 5e-4, 0.03
CAPTIONS = 16  # of a batch, that are also written
DROPOUT = 0.1  # of the tower's features
MEASURED = 40  # steps from one measurement on validation to the next
FEW = 16  # positions of a picture that three batches of four see: a third of the time, and no position is needed


def align(
    connector: nn.Module,
    reader: Reader,
    sources: Sequence[tuple[Captioned, float]],
    validation: Captioned,
    steps: int,
    to: Path,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train the connector; the step with the best search on validation is kept.

    Args:
        connector: The connector, trained in place.
        reader: The frozen decoder.
        sources: Pictures, each with its share of the batches.
        validation: Held-out pictures that choose the step.
        steps: Steps of AdamW.
        to: Folder that the kept connector is written to.
        seed: Seed of the batches.

    Returns:
        A line for each time that it was measured.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    texts = [short_text(caption) for source, _ in sources for caption in source.captions]
    topics = np.array([topic(text) for text in texts])
    with torch.no_grad():
        captions = reader.embed(reader.words(texts))  # (N, D)
    features = torch.cat([source.features for source, _ in sources])
    shares = np.concatenate([np.full(len(source.captions), share / len(source.captions)) for source, share in sources])
    prompt, end = reader.ids(PROMPT), reader.ids("<|im_end|>")
    optimizer = torch.optim.AdamW(connector.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    log: list[dict[str, float]] = []
    best, recent = -1.0, []
    for step in tqdm(range(steps + 1), desc="connector", unit="step"):
        if step % MEASURED == 0 or step == steps:
            line = {"step": step} | ({"loss": float(np.mean(recent))} if recent else {})
            log.append(line | measure(connector, reader, validation))
            tqdm.write(json.dumps({name: round(value, 3) for name, value in log[-1].items()}))
            if log[-1]["to text"] + log[-1]["to picture"] > best:
                best = log[-1]["to text"] + log[-1]["to picture"]
                save_connector(connector, to)
            recent = []
        if step == steps:
            break
        rows = rng.choice(len(texts), BATCH_SIZE, p=shares / shares.sum(), replace=False)
        seen = features[rows]
        if step % 4:
            seen = seen[:, torch.from_numpy(rng.permutation(seen.shape[1])[:FEW])]
        contents = list(connector(F.dropout(seen.float(), DROPOUT)))
        # Search: the states behind the pictures against those of all captions.
        states = reader.states(contents, [[*reader.closed, *prompt]] * BATCH_SIZE)[:, -len(prompt) :].float()
        loss = search_loss(F.normalize(states.mean(1), dim=-1), captions, topics, rows)
        # Captions: what the decoder writes behind the first pictures of the batch.
        tails = [[*reader.opened, *reader.ids(texts[row])[:16], *end] for row in rows[:CAPTIONS]]
        loss = loss + reader.losses(contents[:CAPTIONS], tails, [len(reader.opened)] * CAPTIONS).mean()
        recent.append(_descend(connector, loss, optimizer, schedule))
    return log


def _descend(connector: nn.Module, loss: Tensor, optimizer: Any, schedule: Any) -> float:
    """One step of an optimizer and its schedule, with gradients of at most norm 1; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(connector.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def short_text(caption: str) -> str:
    """At most twelve words of a caption, without the keywords or the meaning behind a colon."""
    return " ".join(caption.split(":")[0].split()[:12])


def search_loss(pictures: Tensor, captions: Tensor, topics: np.ndarray, rows: np.ndarray) -> Tensor:
    """InfoNCE of pictures against all captions, and of their captions against them.

    Args:
        pictures: (B, D) unit vectors.
        captions: (N, D) unit vectors.
        topics: N topics; captions of a picture's own topic are no negatives of it.
        rows: (B,) the captions of the pictures.

    Returns:
        A scalar.
    """
    own = torch.from_numpy(rows)
    scores = pictures @ captions.T / TEMPERATURE
    same = torch.from_numpy(topics[rows][:, None] == topics[None])
    same[torch.arange(len(rows)), own] = False
    scores = scores.masked_fill(same, -1e9)
    to_text = F.cross_entropy(scores, own)
    return (to_text + F.cross_entropy(scores[:, own].T, torch.arange(len(rows)))) / 2
