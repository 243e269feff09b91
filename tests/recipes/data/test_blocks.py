"""Same-source blocks: shares, block length, reshuffling, resuming; distinct rows without decoding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from recipes.data.blocks import WeightedBlockSampler, distinct_rows

SIZES = {"a": 40, "b": 80, "c": 13}


def sampler(weights=(1.0, 2.0, 1.0), block_size=8, batch_size=4, seed=3):
    generator = torch.Generator()
    sources = [Dataset.from_dict({"query": list(range(size))}) for size in SIZES.values()]
    options = {"batch_size": batch_size, "drop_last": True, "generator": generator, "seed": seed}
    samplers = [DefaultBatchSampler(RandomSampler(source, generator=generator), **options) for source in sources]
    named = dict(zip(SIZES, weights, strict=True))
    return WeightedBlockSampler(
        ConcatDataset(sources), samplers, generator, seed, weights=named, block_size=block_size
    )


def source_of(batch):
    (found,) = {"a" if row < 40 else "b" if row < 120 else "c" for row in batch}
    return found


def test_blocks_are_of_one_source_and_follow_the_weights():
    blocks = sampler(weights=(1.0, 6.0, 1.0))
    batches = [batch for epoch in range(12) if blocks.set_epoch(epoch) is None for batch in blocks]
    assert len(blocks) == 2 * -(-80 // 2) and len(batches) == 12 * len(blocks), (
        "source a: 10 batches at a share of 1/8"
    )
    names = [source_of(batch) for batch in batches]
    assert all(names[i] == names[i + 1] for i in range(0, len(names), 2)), "a block is two batches"
    counts = Counter(names)
    assert counts["b"] / len(names) == pytest.approx(6 / 8, abs=0.05)
    assert all(len(batch) == 4 for batch in batches)


def test_a_round_takes_every_full_batch_once_and_the_next_is_reshuffled():
    blocks = sampler(weights=(50.0, 1.0, 1.0))
    rows = [row for batch in blocks if source_of(batch) == "a" for row in batch]
    first, second = rows[:40], rows[40:80]
    assert sorted(first) == list(range(40)) == sorted(second) and first != second


def test_the_order_depends_on_seed_and_epoch_alone():
    first = list(sampler())
    assert list(sampler()) == first
    again = sampler()
    again.set_epoch(1)
    assert list(again) != first
    again.set_epoch(0)
    assert list(again) == first


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"at least one full batch of 16 rows, but \['c'\] have fewer"):
        sampler(batch_size=16, block_size=16)
    with pytest.raises(ValueError, match="multiple of the batch size, got 6 for batches of 4"):
        sampler(block_size=6)
    with pytest.raises(ValueError, match="weights must be above 0"):
        sampler(weights=(0.0, 1.0, 1.0))


def test_distinct_rows_compares_content_without_decoding():
    def side(text, digest=""):
        return {"text": text, "image": "", "video": [], "column": "", "digest": digest, "row": 0}

    queries = [side(f"q{i}") for i in range(8)]
    positives = [side("same", f"picture {i // 2}") for i in range(8)]
    pairs = Dataset.from_dict({"query": queries, "positive": positives})

    def fail(batch):
        raise AssertionError("decoded")

    rows = distinct_rows(pairs.with_transform(fail), batch_size=4, drop_last=True, generator=torch.Generator(), seed=0)
    batches = list(rows)
    assert len(batches) == 2
    assert all(len({row // 2 for row in batch}) == 4 for batch in batches), "each picture once in a batch"


def test_too_few_distinct_rows_for_a_batch_are_an_error_and_no_endless_search():
    """40 rows with 7 answers: no 8 of them differ."""
    columns = {"query": [f"q{i}" for i in range(40)], "positive": [f"answer {i % 7}" for i in range(40)]}
    source = Dataset.from_dict(columns)
    generator = torch.Generator()
    rows = NoDuplicatesBatchSampler(source, batch_size=8, drop_last=True, generator=generator, seed=0)
    blocks = WeightedBlockSampler(ConcatDataset([source]), [rows], generator, 0, weights={"mine": 1.0})
    with pytest.raises(ValueError, match="mine must fill a batch, but a pass over its rows found no 8 .* smaller"):
        list(blocks)
