"""One training step, straight: what `BTokLoss` computes on the attention route, with nothing between the lines.

Start here. `BTokLoss` is this plus what the open world asks for: other routes, memory (`vocabulary_loss.py`), many
processes, loss modifiers, a schedule. `tests/st_btok/training/test_reference.py` holds the two together, in value and
gradients, on every backbone whose information moves between positions by masked attention only.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F

from st_btok.model_parts import embedding_matrix, find_btoks, logit_rule
from st_btok.training.mask import BTOK, condensation_attention
from st_btok.training.targets import join_targets


def training_step(
    model: SentenceTransformer,
    columns: list[dict[str, Any]],
    targets: list[list[Tensor]],
    condensation_weight: float = 0.2,
    scale: float = 50.0,
) -> Tensor:
    """The loss of one batch: in-batch ranking plus condensation (paper, section 3).

    loss = -1/B sum_i log softmax_j(scale · q_i · d_j)_i + condensation_weight · -1/M sum_m log p(y_m | BToks, y_<m)

    Args:
        model: A BTok model whose readout is the mean and whose LM head is its embedding matrix.
        columns: Features of the queries, the positives, and further columns of negatives; each (B, T).
        targets: For each column, what each of its B rows generates: ids, empty for nothing.
        condensation_weight: Weight of the second part.
        scale: Inverse temperature of the first part.

    Returns:
        A scalar to call `backward` on.
    """
    transformer, btoks = find_btoks(model)
    head, logits_of = embedding_matrix(transformer.model), logit_rule(transformer.model.config)  # (V, D)
    embeddings, nll, num_tokens = [], torch.zeros(()), 0
    for features, generated in zip(columns, targets, strict=True):
        # Rows [input][BToks][target]. The backbone is causal, so what stands behind the BToks can't change them ...
        batch = join_targets(features, generated, btoks)
        # ... and under the mask a target token sees the BToks and earlier target tokens, but none of the input.
        with condensation_attention(transformer.model, batch.segments):
            states = transformer(dict(batch.features))["token_embeddings"]  # (B, T + N, D)
        pooled = states[batch.segments == BTOK].unflatten(0, (len(states), len(btoks))).mean(1)  # (B, K, D) -> (B, D)
        embeddings.append(F.normalize(pooled, dim=-1))
        rows, positions = batch.predictors.T  # (M,): the last BTok predicts the first target token
        logits = logits_of(F.linear(states[rows, positions], head))  # (M, V)
        nll = nll + F.cross_entropy(logits, batch.labels, reduction="sum")
        num_tokens += len(batch.labels)
    queries, documents = embeddings[0], torch.cat(embeddings[1:])  # (B, D), (B · documents per query, D)
    similarities = scale * queries @ documents.T
    ranking = F.cross_entropy(similarities, torch.arange(len(queries), device=similarities.device))
    return ranking + condensation_weight * nll / max(1, num_tokens)
