"""The computed table of memory: parameters as published, and sizes that move as they must."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.bench.memory import parameters, step, table
from recipes.bench.settings import MemoryConfig

PAGES = "pages (64 -> 1,280 tokens)"


@pytest.mark.parametrize(("name", "published"), [("Qwen2-VL-2B", 2_208_985_600), ("Qwen2-VL-7B", 8_291_375_616)])
def test_parameters_are_those_of_the_published_checkpoints(name, published):
    total, layers, vision = parameters(name)
    assert total == published
    assert 0 < vision < layers < total


def test_lora_saves_the_optimizer_and_a_larger_mini_batch_costs_activations():
    small, large = (MemoryConfig(mini_batch_size=size) for size in (4, 8))
    lora, full = (step("Qwen2-VL-2B", tuning, PAGES, small) for tuning in ("LoRA", "all weights"))
    assert full.training == 12 * 2_208_985_600 and lora.training < full.training / 50
    assert step("Qwen2-VL-2B", "LoRA", PAGES, large).activations > lora.activations
    assert step("Qwen2-VL-2B", "LoRA", PAGES, large).seconds == lora.seconds


def test_the_page_holds_what_the_command_prints():
    assert table(MemoryConfig()) in (Path(__file__).parents[3] / "docs" / "choosing.md").read_text()
