"""The launch configurations are read by accelerate's own loader, and name what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.mark.parametrize(
    ("name", "kind", "section"),
    [("fsdp2", "FSDP", "fsdp_config"), ("deepspeed_zero2", "DEEPSPEED", "deepspeed_config")],
)
def test_accelerate_reads_the_file(name, kind, section):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it doesn't know
    assert str(config.distributed_type).endswith(kind)
    assert config.mixed_precision == "bf16" and getattr(config, section)


def test_no_file_is_left_untested():
    assert {path.stem for path in FOLDER.iterdir()} == {"fsdp2", "deepspeed_zero2"}
