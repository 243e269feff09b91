"""What a target needs of its source to be read later, and beside the targets of other calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unread:
    """Targets of R rows, and all that they read of their sources.

    Attributes:
        sources: The state of each row's last bottleneck token (R, D), then keys and values (R, H, K, d) of the K of
            them, layer by layer.
        targets: R id tensors, none of them empty.
        last: (R,), or (A, R) with A axes: position of each row's last token, behind which its target stands.
    """

    sources: list[Tensor]
    targets: list[Tensor]
    last: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each target."""
        return [len(target) for target in self.targets]

    def detached(self) -> Unread:
        """The same without a graph."""
        return replace(self, sources=[source.detach() for source in self.sources])

    def take(self, rows: list[int]) -> Unread:
        """Some rows of it, whose sources begin a graph of their own.

        Args:
            rows: Which, in which order.

        Returns:
            New tensors.
        """
        index = torch.tensor(rows, device=self.last.device)
        sources = [source.detach()[index].requires_grad_() for source in self.sources]
        return Unread(sources, [self.targets[row] for row in rows], self.last[..., index])

    @classmethod
    def joined(cls, pieces: Sequence[Unread]) -> Unread:
        """The rows of several calls, one after the other.

        Args:
            pieces: At least one, all of the same number of axes.

        Returns:
            All their rows.
        """
        sources = [torch.cat(parts) for parts in zip(*(piece.sources for piece in pieces), strict=True)]
        targets = [target for piece in pieces for target in piece.targets]
        return cls(sources, targets, torch.cat([piece.last for piece in pieces], -1))


# (M, D) states, (M,) labels and the (V, D) head -> (M,) negative log-likelihoods.
Likelihood = Callable[[Tensor, Tensor, Tensor], Tensor]
# Rows' (R,) likelihoods, in nats.
NllOf = Callable[[Unread], Tensor]
# From what is to be read and what reads it, a part of the graph: (R,) likelihoods, or zeros for those known later.
Reading = Callable[[Unread, NllOf], Tensor]
Readers = tuple[Likelihood | None, Reading | None]
