"""`CachedBTokLoss`: `BTokLoss` for batches that do not fit into memory, by gradient caching.

sentence-transformers' `CachedLossMixin` does the three steps of GradCache (arXiv 2101.06983): embed every mini-batch
without gradients; compute the loss and its gradient with respect to the embeddings; embed every mini-batch again, with
gradients, and back-propagate from there. Here `embed_minibatch` takes rows and calls `BTokLoss.embed`. It returns the
embeddings with one more column, the mini-batch's NLL. So one backward pass carries the gradients of both parts.

The NLL is part of the returned loss, so the pass without gradients reads the targets as well. That pass already knows
the gradient of the NLL with respect to the states that predict the targets, up to one factor for all tokens.
`_KeptNLL` keeps it. So the product with the vocabulary, often the largest matrix of a model, is computed no more often
than in `BTokLoss`.

Mini-batches hold rows of similar length, so that short ones are not read at the width of long ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from torch import Tensor, nn

from st_btok.model_parts import graph_is_kept
from st_btok.training.loss import BTokLoss
from st_btok.training.splitting import Part, row_lengths, row_offsets, sorted_by_length, take_rows
from st_btok.training.vocabulary_loss import KnownNLL, SummedCrossEntropy

_COLUMN = "btok_column"


class CachedBTokLoss(nn.Module):
    """`BTokLoss` under GradCache (arXiv 2101.06983): equal in value and gradients, at the memory of one mini-batch.

    Args:
        model: A BTok model.
        mini_batch_size: Rows per pass, at least 1. Default 32. Only memory and speed depend on it.
        show_progress_bar: Whether to show progress over the mini-batches. Default False.
        **options: All arguments of :class:`BTokLoss`.

    Requirements, inputs and recommendations are those of :class:`BTokLoss`. Best with a large
    `per_device_train_batch_size` and a small `mini_batch_size`.

    Relations:
        - Equal to :class:`BTokLoss` up to rounding; every row is embedded twice, once without gradients.
        - :class:`MatryoshkaLoss` around it works, as around sentence-transformers' own cached losses. It weighs the
          ranking part alone, where it also multiplies the condensation loss of `BTokLoss` by its first weight.
          :class:`AdaptiveLayerLoss` and :class:`Matryoshka2dLoss` do not support cached losses.

    Raises:
        ValueError: As `BTokLoss`; or if `mini_batch_size` is smaller than 1.

    References:
        - Bottleneck Tokens for Unified Multimodal Retrieval: https://arxiv.org/abs/2604.11095, section 3.
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup: https://arxiv.org/abs/2101.06983

    Example:
        ::

            loss = CachedBTokLoss(model, mini_batch_size=8)
            args = SentenceTransformerTrainingArguments(per_device_train_batch_size=1024)
            SentenceTransformerTrainer(model=model, args=args, train_dataset=train_dataset, loss=loss).train()
    """

    uses_gradient_cache = True  # tells MatryoshkaLoss to wrap `calculate_loss`
    requires_media_counts = True  # sentence-transformers before 6.2 counts the media of rows only when asked
    loss_class = BTokLoss

    def __init__(
        self, model: SentenceTransformer, *, mini_batch_size: int = 32, show_progress_bar: bool = False, **options: Any
    ) -> None:
        super().__init__()
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}.")
        self.model = model
        self.loss = self.loss_class(model, **options)
        self.schedule = self.loss.schedule
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar
        self._fingerprints: list[Tensor] = []
        self._orders: list[list[int]] = []

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Both parts for one batch; the backward pass embeds every mini-batch again.

        Args:
            sentence_features: One dict of features per column: query, positive, negatives.
            labels: Not used.

        Returns:
            The weighted parts, whose values sum to the loss; `ranking` carries the gradient of both.

        Raises:
            ValueError: As `BTokLoss`; or if a media tensor can't be split by rows.
        """
        columns = list(sentence_features)
        self.loss.check(columns)
        self._fingerprints = self.loss.fingerprints(columns)
        weight = self.loss.weight()
        targets: list[list[Tensor] | None] = self.loss.targets(columns) if weight else [None] * len(columns)
        cache = _GradCache(self, weight, sum(len(target) for column in targets if column for target in column))
        self._orders, prepared = [], []
        for number, (features, target) in enumerate(zip(columns, targets, strict=True)):
            whole = Part(features, target)
            offsets = row_offsets(features, self.loss.reader.media_tokens)
            self._orders.append(self._order(whole))
            column = _Column(number, whole, offsets, self._orders[-1])
            # The mixin counts the rows of `input_ids`, and asks for mini-batches by begin and end.
            prepared.append({"input_ids": features["input_ids"], _COLUMN: column})
        cached = cache.forward_cached(prepared)
        self.loss.report(columns, targets, cache.ranking, cache.nll, cache.tokens, weight)
        # The mixin's second pass starts from the gradient of one tensor, `cached`. Both parts have their values, so
        # `cached` is added with the value 0: it brings its gradient along and changes no value.
        zero_with_gradient = cached - cached.detach()
        return {"ranking": cache.ranking + zero_with_gradient, "condensation": weight * cache.nll}

    def _order(self, column: Part) -> list[int]:
        """Row numbers in the order in which mini-batches take them: by length, if there are several mini-batches."""
        rows = len(column.features["input_ids"])
        return list(range(rows)) if rows <= self.mini_batch_size else sorted_by_length(row_lengths(column))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The ranking part, from each column's mini-batches of embeddings; what MatryoshkaLoss wraps.

        Args:
            reps: Per column, mini-batches of (b, D) embeddings, in the order of `forward`'s mini-batches.
            labels: Not used.
            with_backward: Whether to back-propagate to `reps` and return a detached value.

        Returns:
            A scalar.
        """
        embeddings = []
        for column, order in zip(reps, self._orders, strict=True):
            embeddings.append(torch.cat(column)[torch.tensor(order, device=column[0].device).argsort()])
        loss = self.loss.rank(embeddings, self._fingerprints)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**self.loss.get_config_dict(), "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """BibTeX of the method."""
        return self.loss.citation


@dataclass(frozen=True)
class _Column:
    """One column of a batch, from which `embed_minibatch` takes rows."""

    number: int  # in the batch
    whole: Part  # all rows
    offsets: dict[str, list[int]]  # from `row_offsets`
    order: list[int]  # row numbers in the order of the mini-batches


class _GradCache(CachedLossMixin):
    """GradCache over the [embeddings | NLL] of one batch.

    A class beside `CachedBTokLoss`, because loss modifiers wrap that one's `calculate_loss` and expect it to get
    embeddings only.
    """

    def __init__(self, owner: CachedBTokLoss, weight: float, tokens: int) -> None:
        self.owner, self.weight, self.own_tokens = owner, weight, tokens
        self.model = owner.loss.model
        self.mini_batch_size = owner.mini_batch_size
        self.show_progress_bar = owner.show_progress_bar
        self.kept = _KeptNLL()
        self.ranking = self.nll = self.tokens = torch.zeros(())

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """(b, D + 1), at least float32: embeddings, flattened over budgets, and an equal share of the NLL."""
        column: _Column = sentence_feature[_COLUMN]
        part = take_rows(column.whole, column.order[begin:end], column.offsets)
        key = (column.number, begin)
        likelihood = None  # evaluation has one pass only
        if copy_random_state:  # the first of two passes
            likelihood = partial(self.kept.first_pass, key)
        elif with_grad:
            likelihood = partial(self.kept.second_pass, key)
        with random_state or nullcontext(), torch.set_grad_enabled(with_grad):
            state = RandContext(*part.features.values()) if copy_random_state else None
            embedded = self.owner.loss.embed(part, likelihood)
            embeddings = embedded.embedding.flatten(1)
            precise = torch.promote_types(embeddings.dtype, torch.float32)
            shares = (embedded.nll.to(precise) / len(embeddings)).expand(len(embeddings), 1)
            return torch.cat([embeddings.to(precise), shares], 1), state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Both parts; with `with_backward`, their gradients are left in `reps`."""
        loss = self.owner.loss
        # 1. Split `reps` into embeddings in the loss' own shape and the NLL of the whole batch.
        shape = (-1,) if loss.budgets is None else (len(loss.budgets), -1)
        embeddings = [[rep[:, :-1].detach().unflatten(1, shape) for rep in column] for column in reps]
        nll = torch.stack([rep[:, -1].detach().sum() for column in reps for rep in column]).sum()
        for leaf in [nll, *(rep for column in embeddings for rep in column)]:
            leaf.requires_grad_(with_backward)
        # 2. Both parts.
        self.ranking = self.owner.calculate_loss(embeddings, labels, with_backward=with_backward)
        mean, self.tokens = loss.condense(nll, self.own_tokens, self.weight)
        self.ranking, self.nll = self.ranking.detach(), mean.detach()
        # 3. Join the gradients again: each embedding's, and beside it that of the NLL, the same for all rows.
        if with_backward:
            slope = torch.autograd.grad(self.weight * mean, nll)[0]
            for column, parts in zip(reps, embeddings, strict=True):
                for rep, part in zip(column, parts, strict=True):
                    grad = torch.zeros_like(part) if part.grad is None else part.grad
                    rep.grad = torch.cat([grad.flatten(1), slope.expand(len(rep), 1)], 1)
        return self.ranking + self.weight * self.nll


class _KeptNLL:
    """The NLL of every mini-batch, computed in the first pass and used again in the second.

    The first pass has no graph. But the gradients of the NLL, with respect to the states and to the LM head, are known
    as soon as its logits are; they still lack one factor, which the backward pass brings. The second pass puts the
    kept values and gradients into its graph, and does not multiply by the vocabulary.
    """

    def __init__(self) -> None:
        self.sum = SummedCrossEntropy()
        self.found: dict[tuple[int, int], KnownNLL] = {}  # by mini-batch

    def first_pass(
        self, key: tuple[int, int], states: Tensor, head: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        """Compute and keep a mini-batch's NLL and its gradients."""
        self.found[key] = self.sum.known(states, head, labels, softcap, (True, head.requires_grad))
        return self.found[key].value

    def second_pass(
        self, key: tuple[int, int], states: Tensor, head: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        """The same value, now with a graph."""
        known = self.found[key]
        if known.weight_grad is not None and graph_is_kept():  # another backward pass may come, so it stays
            known = replace(known, weight_grad=known.weight_grad.clone())
        return known.with_graph(states, head)
