"""The last step of `seeing.py`'s connector: a picture's bottleneck tokens are to say what its caption's say.

The decoder stays frozen, and so do the captions' embeddings, which are computed once: with p a picture's embedding
(the mean over the states of " The topic is the" behind it) and c_j those of all N training captions,

    loss = (InfoNCE(p_i -> c_1..N) + InfoNCE(c_i -> p_1..B)) / 2 + nats a token of some captions

so that the search learns from every caption at every step, and what a picture says is not forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.research.seeing_connector import PROMPT, Reader, descend, measure, save_connector
from recipes.research.seeing_pictures import Captioned, topic

BATCH_SIZE, RATE, TEMPERATURE = 48, 5e-4, 0.03
CAPTIONS = 8  # of a batch, that are also written
DROPOUT = 0.1  # of the tower's features
SHARES = (0.5, 0.25, 0.25)  # of stamps, clip art and emoji


def align(
    connector: nn.Module, reader: Reader, trained: Sequence[Captioned], validation: Captioned, steps: int, to: Path
) -> list[dict[str, float]]:
    """Train the connector to search; the step with the best search on validation is kept.

    Args:
        connector: The connector, trained in place.
        reader: The frozen decoder.
        trained: Pictures of stamps, clip art and emoji.
        validation: Held-out pictures that choose the step.
        steps: Steps of AdamW.
        to: Folder that the kept connector is written to.

    Returns:
        A line for each time that it was measured.
    """
    texts = short_texts(trained)
    topics = np.array([topic(text) for text in texts])
    with torch.no_grad():
        captions = reader.embed(reader.words(texts))  # (N, D)
    features = torch.cat([source.features for source in trained])
    sizes = [len(source.captions) for source in trained]
    shares = np.concatenate([np.full(size, share / size) for size, share in zip(sizes, SHARES, strict=True)])
    prompt, end = reader.ids(PROMPT), reader.ids("<|im_end|>")
    optimizer = torch.optim.AdamW(connector.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    log: list[dict[str, float]] = []
    best, recent = -1.0, []
    for step in range(steps + 1):
        if step % 20 == 0:
            line = {"step": step} | ({"loss": float(np.mean(recent))} if recent else {})
            log.append(line | measure(connector, reader, validation))
            print(json.dumps({name: round(value, 3) for name, value in log[-1].items()}), flush=True)
            if log[-1]["to text"] + log[-1]["to picture"] > best:
                best = log[-1]["to text"] + log[-1]["to picture"]
                save_connector(connector, to)
            recent = []
        if step == steps:
            break
        rows = rng.choice(len(texts), BATCH_SIZE, p=shares / shares.sum(), replace=False)
        contents = list(connector(F.dropout(features[rows].float(), DROPOUT)))
        states = reader.states(contents, [[*reader.closed, *prompt]] * BATCH_SIZE)[:, -len(prompt) :].float()
        loss = search_loss(F.normalize(states.mean(1), dim=-1), captions, topics, rows)
        tails = [[*reader.opened, *reader.ids(texts[row])[:16], *end] for row in rows[:CAPTIONS]]
        loss = loss + reader.losses(contents[:CAPTIONS], tails, [len(reader.opened)] * CAPTIONS).mean()
        recent.append(descend(connector, loss, optimizer, schedule))
    return log


def short_texts(trained: Sequence[Captioned]) -> list[str]:
    """Captions of at most twelve words; of clip art, whose captions end in keywords, the topic alone."""
    stamps, clipart, emoji = (source.captions for source in trained)
    captions = [*stamps, *map(topic, clipart), *emoji]
    return [" ".join(caption.split()[:12]) for caption in captions]


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
