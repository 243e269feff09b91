"""Fewer bottleneck tokens at encode time: budgets k <= K that read only the first k tokens.

Attention is causal, so the first k states are the same whether k or K tokens are appended. A model trained on several
budgets (`BTokLoss(model, btok_budgets=(1, 2, 4))`) can therefore be read at any of them, at the cost of k tokens: the
counterpart, over tokens, of Matryoshka's truncation over dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import WordWeights
from torch import nn
from torch.nn import functional as F

from st_btok.bare_text import frame_bare_text
from st_btok.chat_template import append_btoks
from st_btok.model_parts import find_btoks, tokenizer_of
from st_btok.pooling import BTokPooling, select_btoks
from st_btok.tokens import btok_tokens


def check_budgets(model: SentenceTransformer, budgets: Sequence[int]) -> tuple[int, ...]:
    """Budgets, largest first; a `ValueError` if one is not in 1 to K, K is missing, or the model pools fewer."""
    _, ids = find_btoks(model)
    weights = next((module for module in model.modules() if isinstance(module, WordWeights)), None)
    pooled = [] if weights is None else weights.emb_layer.weight.flatten().nonzero().flatten().tolist()
    if sorted(pooled) != sorted(ids):
        raise ValueError('budgets need a model that pools all of its bottleneck tokens: build_model(readout="mean").')
    ordered = tuple(sorted(set(budgets), reverse=True))
    if not ordered or ordered[0] != len(ids) or ordered[-1] < 1:
        raise ValueError(
            f"btok_budgets must lie between 1 and K = {len(ids)} and hold K itself, got {tuple(budgets)}. "
            f"For example {tuple(2**i for i in range(len(ids).bit_length()) if 2**i <= len(ids))}."
        )
    return ordered


def check_appends_all(model: SentenceTransformer) -> None:
    """Refuse to train a model that appends fewer bottleneck tokens than it has, such as one from `read_budget`."""
    transformer, ids = find_btoks(model)
    row = transformer.preprocess([{"text": "a"}])["input_ids"][0].tolist()
    count = sum(token in row for token in ids)
    if count < len(ids):
        raise ValueError(
            f"a model to train must append all K = {len(ids)} bottleneck tokens of its tokenizer, but this appends "
            f"{count}: is it from read_budget, which is for encoding? Train the whole model with "
            f"BTokLoss(model, btok_budgets=({count}, {len(ids)})) and call read_budget afterwards."
        )


@contextmanager
def budget_embeddings(model: SentenceTransformer, btoks: list[int], budgets: tuple[int, ...]) -> Iterator[None]:
    """Inside this block, the model's `sentence_embedding` is (B, len(budgets), D): means over the first states."""

    def pool(module: nn.Module, args: tuple[Any, ...], output: dict[str, Any]) -> dict[str, Any]:
        states = select_btoks(output["token_embeddings"], output["input_ids"], output["attention_mask"], btoks)
        means = torch.stack([states[:, :budget].mean(1) for budget in budgets], 1)  # (B, budgets, D)
        output["sentence_embedding"] = F.normalize(means, dim=-1)
        return output

    # Behind the last module: the pass runs as it is (under DDP, too), and its own mean over all K is written over.
    handle = model[-1].register_forward_hook(pool)
    try:
        yield
    finally:
        handle.remove()


def read_budget(model: SentenceTransformer, num_btoks: int) -> SentenceTransformer:
    """A copy of a BTok model that appends and pools only its first `num_btoks` tokens; stock modules, for encoding.

    Args:
        model: A BTok model with the mean over all K tokens as its readout, best trained with `btok_budgets`.
        num_btoks: k, from 1 to K.

    Returns:
        A new model; save it and it loads plainly.

    Raises:
        ValueError: If k is out of range, or the model does not pool all K tokens.
    """
    _, ids = find_btoks(model)
    check_budgets(model, (len(ids),))
    if not 1 <= num_btoks <= len(ids):
        raise ValueError(f"num_btoks must lie between 1 and K = {len(ids)}, got {num_btoks}.")
    result = copy.deepcopy(model)
    transformer, _ = find_btoks(result)
    tokenizer = tokenizer_of(transformer)
    whole, part = "".join(btok_tokens(len(ids))), "".join(btok_tokens(num_btoks))
    kept: Any = transformer.processing_kwargs.get("chat_template", {})
    if "chat_template" in kept:  # for processors that would otherwise use a template of their own
        kept["chat_template"] = append_btoks(kept["chat_template"].replace(whole, part), num_btoks)
    for owner in (transformer.processor, tokenizer):
        if isinstance(getattr(owner, "chat_template", None), str):
            owner.chat_template = append_btoks(owner.chat_template.replace(whole, part), num_btoks)
    number = next(i for i, module in enumerate(result) if isinstance(module, WordWeights))
    pooling = BTokPooling(transformer.get_embedding_dimension(), ids[:num_btoks], "mean")
    present: Any = result[number]
    weights, _ = pooling.stock_modules(tokenizer, len(present.vocab))
    result[number] = weights.to(result.device)
    frame_bare_text(transformer)
    return result
