"""`CachedBTokLoss`: `BTokLoss` for batches that do not fit into memory, by gradient caching.

The plain loss owns all maths; this one only schedules it in mini-batches, with sentence-transformers' own GradCache.
A mini-batch's pass returns [embeddings | summed NLL] as one tensor, so that one backward pass per mini-batch carries
both gradients: for the last column that is weight / tokens, known before any gradient flows. The pass without
gradients reads the targets too, because the loss is returned, and logged, before the second pass begins, and what it
returns has to be true; what that pass learns about the vocabulary is kept (`cached_likelihood.py`), not made anew.
Mini-batches hold rows of similar length, so that short ones are not read at the width of long ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from torch import Tensor, nn

from st_btok.model_parts import find_btoks, unwrap
from st_btok.training.apart import Apart, is_alone
from st_btok.training.buckets import row_lengths
from st_btok.training.cached_likelihood import CachedLikelihood
from st_btok.training.loss import BTokLoss
from st_btok.training.negatives import RowFacts
from st_btok.training.slicing import row_offsets, take_rows
from st_btok.training.unread import NllOf, Readers, Unread

_COLUMN = "btok_column"


class CachedBTokLoss(nn.Module):
    """`BTokLoss` under GradCache (arXiv 2101.06983): equal in value and gradients, at the memory of one mini-batch.

    Args:
        model: A BTok model.
        mini_batch_size: Rows per pass, at least 1. Default 32. Only memory and speed depend on it.
        mini_batch_num_tokens: If given, mini-batches are packed up to this many input tokens instead.
        show_progress_bar: Whether to show progress over the mini-batches. Default False.
        **options: All arguments of :class:`BTokLoss`.

    Requirements:
        1. As :class:`BTokLoss`. Best with a large `per_device_train_batch_size` and a small `mini_batch_size`.

    Inputs:
        +-------------------------------------------------+--------+
        | Inputs                                          | Labels |
        +=================================================+========+
        | (query, positive) pairs                         | none   |
        +-------------------------------------------------+--------+
        | (query, positive, negative) triplets            | none   |
        +-------------------------------------------------+--------+
        | (query, positive, negative_1, ..., negative_n)  | none   |
        +-------------------------------------------------+--------+

    Recommendations:
        - Use ``BatchSamplers.NO_DUPLICATES``, so that no in-batch negative equals the positive.

    Relations:
        - Equal to :class:`BTokLoss` up to rounding; every row is embedded twice, once without gradients.
        - :class:`MatryoshkaLoss` around it works, as around sentence-transformers' own cached losses.
          :class:`AdaptiveLayerLoss` and :class:`Matryoshka2dLoss` do not support cached losses.

    Raises:
        ValueError: As `BTokLoss`; or if `mini_batch_size` or `mini_batch_num_tokens` is smaller than 1.

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

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.model = model
        self.loss = BTokLoss(model, **options)
        self.schedule = self.loss.schedule
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self._facts: list[RowFacts] = []
        self._orders: list[list[int]] = []

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Both parts for one batch; the backward pass embeds every mini-batch again.

        Args:
            sentence_features: One dict of features per column: query, positive, negatives.
            labels: Not used.

        Returns:
            The weighted parts, whose values sum to the loss; `ranking` carries the gradient of both.

        Raises:
            ValueError: If a row lacks its bottleneck tokens, or a media tensor can't be split by rows.
        """
        columns = list(sentence_features)
        self._facts = self.loss.facts(columns)
        weight, targets = self.loss.targets(columns)
        longest = max((len(target) for column in targets if column for target in column), default=0)
        apart = self.loss.apart(targets, self.mini_batch_num_tokens or self.mini_batch_size * longest)
        self._orders = [
            self._order(features, None if apart else target) for features, target in zip(columns, targets, strict=True)
        ]
        media = self.loss.reader.media_tokens
        prepared = []
        for number, (features, order) in enumerate(zip(columns, self._orders, strict=True)):
            # What the mixin cuts into mini-batches: rows by number, in their order. Pixels are taken when read.
            ids, mask = features["input_ids"][order], features["attention_mask"][order]
            last = number == len(columns) - 1
            column = Column(number, features, targets[number], row_offsets(features, media), order, last)
            prepared.append({"input_ids": ids, "attention_mask": mask, _COLUMN: column})
        tokens = sum(len(target) for column in targets if column for target in column)
        passes = _GradCache(self, weight, tokens, apart)
        total = passes.forward_cached(prepared)
        carrier = total - total.detach()
        if carrier.requires_grad:
            carrier.register_hook(passes.back_propagate_kept)
        condensation = (weight * passes.nll).detach()
        self.loss.report(columns, targets, passes.nll, passes.tokens, weight)
        # GradCache has one tensor whose gradient starts its second pass; the value of each part stays its own.
        return {"ranking": passes.ranking.detach() + carrier, "condensation": condensation}

    def _order(self, features: dict[str, Any], targets: list[Tensor] | None) -> list[int]:
        """Row numbers by length, longest last: the last mini-batch is the one that is not embedded twice."""
        rows = list(range(len(features["input_ids"])))
        if len(rows) <= self.mini_batch_size and self.mini_batch_num_tokens is None:
            return rows
        lengths = row_lengths(features, targets)
        return sorted(rows, key=lambda row: lengths[row])

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The ranking part, from each column's mini-batches of embeddings.

        Args:
            reps: Per column, mini-batches of (b, D) embeddings, in the order of `forward`'s mini-batches.
            labels: Not used.
            with_backward: Whether to back-propagate to `reps` and return a detached value.

        Returns:
            A scalar.
        """
        embeddings = []
        for column, order in zip(reps, self._orders, strict=True):
            place = torch.tensor(order, device=column[0].device).argsort()
            embeddings.append(torch.cat(column)[place])
        loss = self.loss.rank(embeddings, self._facts)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {
            **self.loss.get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the method."""
        return self.loss.citation


@dataclass(frozen=True)
class Column:
    """One column of a batch, with all that its mini-batches are made from.

    Attributes:
        number: Its place in the batch.
        features: Its features, B rows.
        targets: What its rows generate; None for nothing.
        offsets: From `row_offsets`.
        order: Row numbers in the order of the mini-batches.
        last: Whether it is the last of the batch.
    """

    number: int
    features: dict[str, Any]
    targets: list[Tensor] | None
    offsets: dict[str, list[int]]
    order: list[int]
    last: bool


class _GradCache(CachedLossMixin):
    """One batch's three steps of GradCache over [embeddings | NLL], as a contract of sentence-transformers' mixin.

    Apart from the loss, so that what a loss modifier wraps, `CachedBTokLoss.calculate_loss`, sees embeddings only.
    """

    def __init__(self, owner: CachedBTokLoss, weight: float, tokens: int, apart: Apart | None) -> None:
        self.owner, self.weight, self.own_tokens, self.apart = owner, weight, tokens, apart
        self.model = owner.loss.model
        self.mini_batch_size = owner.mini_batch_size
        self.mini_batch_num_tokens = owner.mini_batch_num_tokens
        self.show_progress_bar = owner.show_progress_bar
        self.likelihood = CachedLikelihood()
        # The last mini-batch is not embedded twice: its graph stays until the backward pass, which begins with it. No
        # more than one mini-batch's activations are alive at a time, as without.
        self.keeps_last = is_alone(find_btoks(unwrap(self.model))[0].model)
        self.kept: tuple[Tensor, tuple[int, int]] | None = None
        self.passed: tuple[int, int] | None = None
        self.last_grad = torch.zeros(())
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
        """(b, D + 1), at least float32: embeddings, flattened over budgets, and the NLL of each row behind them."""
        column: Column = sentence_feature[_COLUMN]
        rows = column.order[begin:end]
        features = take_rows(column.features, rows, column.offsets)
        targets = [column.targets[row] for row in rows] if column.targets else []
        key = (column.number, begin)
        if key == self.passed:  # its backward pass is over, see `back_propagate_kept`
            self.passed = None
            return self.last_grad.detach(), None
        keeps = copy_random_state and self.keeps_last and column.last and end >= len(column.order)
        if keeps and self.apart is not None:
            self.apart.read()  # while no activations are alive
        readers = partial(self._readers, key, with_grad or keeps, copy_random_state)
        with random_state or nullcontext(), torch.set_grad_enabled(with_grad or keeps):
            state = RandContext(*features.values()) if copy_random_state else None
            generated = targets if any(map(len, targets)) else None
            embedding, nll = self.owner.loss.embed_in_buckets(features, generated, self.apart is not None, readers)
            if not len(nll):
                nll = embedding.new_zeros(len(rows), dtype=torch.float32)
            precise = torch.promote_types(embedding.dtype, torch.float32)
            reps = torch.cat([embedding.flatten(1).to(precise), nll[:, None].to(precise)], 1)
        if keeps:
            self.kept = reps, key
            return reps.detach(), state
        return reps, state

    def back_propagate_kept(self, factor: Tensor) -> None:
        """The backward pass of the mini-batch whose graph is still there, before any other is embedded again."""
        if self.kept is not None and self.kept[0].requires_grad:
            reps, self.passed = self.kept
            with torch.enable_grad():  # off inside of a hook
                (torch.dot(reps.flatten(), self.last_grad.flatten()) * factor).backward()  # type: ignore[no-untyped-call]
        self.kept = None  # a second backward pass embeds this mini-batch like the others

    def _readers(self, key: tuple[int, ...], with_grad: bool, again: bool, part: int) -> Readers:
        """How targets are read: in the first pass (`again`: a second follows); their gradients go where a graph is."""
        if not (with_grad or again):  # evaluation
            return None, None
        key, apart = (*key, part), self.apart

        def likelihood(*arguments: Tensor) -> Tensor:
            nll = self.likelihood.read(key, *arguments) if again else None
            return self.likelihood.replay(key, *arguments) if nll is None or with_grad else nll

        if apart is None:
            return likelihood, None

        def reading(unread: Unread, nll_of: NllOf) -> Tensor:
            if again:
                apart.add(key, unread, nll_of)
            return apart.enter(key, unread.sources) if with_grad else unread.sources[0].new_zeros(len(unread.targets))

        return None, reading

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Both parts; with `with_backward`, their gradients are left in `reps`."""
        loss = self.owner.loss
        shape = (-1,) if loss.budgets is None else (len(loss.budgets), -1)
        embeddings = [[rep[:, :-1].detach().unflatten(1, shape) for rep in column] for column in reps]
        sums = [rep[:, -1].detach() for column in reps for rep in column]
        if with_backward:
            for rep in [rep for column in embeddings for rep in column]:
                rep.requires_grad_()
        value = torch.cat(sums).sum() + (self.apart.read() if self.apart else 0)
        nll = value.requires_grad_(with_backward)
        self.ranking = self.owner.calculate_loss(embeddings, labels, with_backward=with_backward)
        self.nll, self.tokens = loss.condense(nll, self.own_tokens, self.weight)
        if with_backward:
            slope = torch.autograd.grad(self.weight * self.nll, nll)[0]
            for column, parts in zip(reps, embeddings, strict=True):
                for rep, part in zip(column, parts, strict=True):
                    grad = torch.zeros_like(part) if part.grad is None else part.grad
                    self.last_grad = rep.grad = torch.cat([grad.flatten(1), slope.expand(len(rep), 1)], 1)
        self.nll = self.nll.detach()
        return self.ranking + self.weight * self.nll
