"""Same-source blocks: which source the next batches come from.

sentence-transformers builds every batch from one data set; this sampler draws, by weight, the source of each *block*
of consecutive batches. With N processes a step takes N consecutive batches, so a block of 512 rows is the set within
which in-batch negatives share a source, as in the authors' training (blocks of 512, batches of 128).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler, NoDuplicatesBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset

from recipes.data.training_pairs import content_key


class WeightedBlockSampler(MultiDatasetDefaultBatchSampler):
    """Draws blocks of batches from sources by weight, with replacement; a source that runs out is reshuffled.

    An epoch is as long as it takes, on average, until every source has been seen once. The order depends on seed and
    epoch only, so a resumed run continues it.

    Args:
        dataset: The concatenated sources.
        batch_samplers: One per source; their batches must be full (`dataloader_drop_last=True`).
        generator: Random generator, shared with the sources' samplers.
        seed: Seed.
        weights: Share of each source, above 0, in the order of the sources.
        block_size: Rows of a block: a multiple of the batch size; 0 for one batch.

    Raises:
        ValueError: A source without a full batch, a bad weight, or a `block_size` that is no multiple.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        weights: Mapping[str, float],
        block_size: int = 0,
    ) -> None:
        super().__init__(dataset, batch_samplers, generator or torch.Generator(), seed)
        short = [name for name, sampler in zip(weights, batch_samplers, strict=True) if len(sampler) < 1]
        if short:
            raise ValueError(
                f"a source needs at least one full batch of {self.batch_size} rows, but {short} have fewer. "
                "Lower per_device_train_batch_size, or leave these sources out."
            )
        if min(weights.values()) <= 0:
            raise ValueError(f"weights must be above 0, got {dict(weights)}. Leave a source out instead.")
        if block_size % self.batch_size:
            raise ValueError(
                f"block_size must be a multiple of the batch size, got {block_size} for batches of {self.batch_size}."
            )
        self.block = max(1, block_size // self.batch_size)
        self.names = list(weights)
        total = sum(weights.values())
        self.shares = torch.tensor([weight / total for weight in weights.values()], dtype=torch.float64)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of row numbers in the concatenated data set."""
        self.generator.manual_seed(self.seed + self.epoch)
        sources = torch.multinomial(self.shares, len(self) // self.block, replacement=True, generator=self.generator)
        offsets = [0, *accumulate(len(source) for source in self.dataset.datasets)]
        streams = [self._endless(number) for number in range(len(self.batch_samplers))]
        for source in sources.tolist():
            for _ in range(self.block):
                yield [offsets[source] + row for row in next(streams[source])]

    def _endless(self, number: int) -> Iterator[list[int]]:
        sampler, rounds = self.batch_samplers[number], 0
        while True:
            # Samplers that reseed themselves would repeat their order: each round counts as an epoch of its own.
            sampler.set_epoch(self.epoch + 1000 * rounds)
            found = 0
            for batch in sampler:
                found += 1
                yield batch
            if not found:  # the next rounds would find none either, for ever
                raise ValueError(
                    f"{self.names[number]} must fill a batch, but a pass over its rows found no {self.batch_size} in "
                    "which no query or positive occurs twice. Pass a smaller --batch_size, or leave out --distinct."
                )
            rounds += 1

    def __len__(self) -> int:
        """Number of batches, a multiple of the block."""
        needed = max(len(s) / share for s, share in zip(self.batch_samplers, self.shares.tolist(), strict=True))
        return self.block * math.ceil(needed / self.block)


def weighted_blocks(weights: Mapping[str, float], block_size: int) -> Callable[..., WeightedBlockSampler]:
    """What `multi_dataset_batch_sampler` takes."""
    return partial(WeightedBlockSampler, weights=weights, block_size=block_size)


def distinct_rows(dataset: Dataset, **options: Any) -> NoDuplicatesBatchSampler:
    """What `batch_sampler` takes: no query, positive or negative twice in a batch, compared undecoded, by content.

    sentence-transformers' own `no_duplicates` would decode every medium to compare it. Not for sources of few labels:
    a batch then holds each label once.
    """
    pairs = dataset.with_format(None)
    keys = {side: [content_key(value) for value in pairs[side]] for side in pairs.column_names}
    return NoDuplicatesBatchSampler(Dataset.from_dict(keys), **options)
