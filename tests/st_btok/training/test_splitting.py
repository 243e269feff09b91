"""Parts of a batch: rows of similar length together, and every row keeps exactly its own media, in every family."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from st_btok.model_parts import media_tokens
from st_btok.training.splitting import Part, best_split, call_cost, row_offsets, split_by_length, take_rows
from tests.backbones import inputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_slice_embeds_like_its_rows(model, family, side):
    model.tokenizer.padding_side = side
    samples = inputs(family)[:-1]
    samples = [samples[i] for i in torch.randperm(len(samples), generator=torch.Generator().manual_seed(1)).tolist()]
    features = model.preprocess(samples)
    offsets = row_offsets(features, media_tokens(model[0]))
    with torch.no_grad():
        whole = model(dict(features))["sentence_embedding"]
        last = len(samples) - 1
        for rows in ([0], [1, 2], [*range(2, last + 1)], [last], [last, 0, 2], [*range(last, -1, -1)]):
            part = take_rows(Part(features), rows, offsets).features
            torch.testing.assert_close(model(part)["sentence_embedding"], whole[rows], atol=1e-5, rtol=0)


def test_columns_that_are_padding_in_all_rows_are_dropped(qwen):
    features = qwen.preprocess(["a", "a longer text", "b"])
    offsets = row_offsets(features, media_tokens(qwen[0]))
    part = take_rows(Part(features), [2], offsets).features
    assert torch.equal(part["input_ids"], qwen.preprocess(["b"])["input_ids"])
    assert part["modality"] == features["modality"]


def test_media_that_can_not_be_told_apart_are_an_error():
    features = {
        "input_ids": torch.tensor([[7, 7, 7, 7, 1], [7, 7, 1, 1, 1]]),
        "attention_mask": torch.ones(2, 5),
        "pixel_values": torch.zeros(4, 3, 2, 2),
    }
    with pytest.raises(ValueError, match=r"pixel_values has 4 entries for rows with \[4, 2\] placeholder tokens"):
        row_offsets(features, {"image": 7})
    features["pixel_values"] = torch.zeros(3, 3, 2, 2)
    assert row_offsets(features, {"image": 7})["pixel_values"] == [0, 2, 3], "2 tokens for each tile"


def test_rows_are_split_where_that_saves_padding():
    assert best_split([], 100) == [[]]
    assert best_split([50] * 8, 100) == [list(range(8))], "nothing to save"
    assert best_split([10, 20, 12, 22], 100) == [[0, 1, 2, 3]], "less to save than a call costs"
    assert best_split([1000, 10, 1000, 10], 100) == [[1, 3], [0, 2]]
    assert best_split([100, 5000, 1200, 2500, 100, 5000, 1200, 2500], 100) == [[0, 4], [2, 6], [3, 7], [1, 5]]
    assert best_split([7, 900, 7, 7], 100) == [[0, 2, 3], [1]], "one long row"


def test_targets_are_read_in_four_parts_at_most():
    """Each part keeps a gradient of the head until the backward pass."""
    mask = (torch.arange(2000) < 200 * torch.arange(1, 11)[:, None]).long()
    features = {"input_ids": mask, "attention_mask": mask}
    assert 1 < len(split_by_length(Part(features, [torch.ones(5)] * 10), {}, cost=1)) <= 4
    assert len(split_by_length(Part(features), {}, cost=1)) == 10


def test_no_split_into_neighbours_reads_less():
    """Against all splits of eight rows."""
    generator = torch.Generator().manual_seed(0)
    for cost in (0, 5, 40):
        lengths = torch.randint(1, 40, (8,), generator=generator).tolist()
        ordered, splits = sorted(lengths), []
        for cuts in range(2**7):
            ends = [i + 1 for i in range(7) if cuts >> i & 1] + [8]
            parts = [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            splits.append(sum(len(part) * part[-1] + cost for part in parts))
        found = best_split(lengths, cost)
        assert sorted(row for rows in found for row in rows) == list(range(8))
        assert sum(len(rows) * max(lengths[row] for row in rows) + cost for rows in found) == min(splits)


def decoder(width, vocabulary=1000, device="cpu"):
    """A decoder of a width; on the meta device as on any that is no CPU."""
    with torch.device(device):
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=width, num_hidden_layers=2)
        return LlamaModel(config)


def test_a_call_costs_an_accelerator_more_than_short_rows_save():
    lengths = [8, 64] * 16
    assert len(best_split(lengths, call_cost(decoder(576)))) == 2
    assert len(best_split(lengths, call_cost(decoder(576, device="meta")))) == 1, "32 texts into a small decoder"
    pages = [100 * length for length in lengths]
    assert len(best_split(pages, call_cost(decoder(1536, device="meta")))) == 2, "pages into a larger one"
    assert call_cost(decoder(64)) > 2 * call_cost(decoder(576)), "the larger the model, the less a call weighs"


def test_a_trained_vocabulary_makes_calls_dear():
    """Each would give it a gradient of its own size; a frozen one, as under LoRA, gets none."""
    small, large = decoder(64), decoder(64, 50_000)
    assert call_cost(large) > 5 * call_cost(small)
    for model in (small, large):
        model.get_input_embeddings().requires_grad_(False)
    assert call_cost(large) == call_cost(small)
