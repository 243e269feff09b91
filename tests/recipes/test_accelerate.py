"""The launch configurations are read by accelerate's own loader, and name what they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
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


def launch(tmp_path, name, *options):
    """Two steps of `recipes.train` on text, started by `accelerate launch` with a file."""
    rows = [{"query": f"question {i}", "positive": f"the answer is {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    command += ["--num_processes=1", "--mixed_precision=no", *options, "-m", "recipes.train", "--validation_size=0"]
    command += [
        "--backbone=recipes/backbone",
        f"--data={tmp_path / 'pairs.jsonl'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    command += [
        "--max_steps=2",
        "--per_device_train_batch_size=2",
        "--use_cpu=True",
        "--bf16=False",
        "--report_to=none",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    return subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, timeout=300)


def test_started_on_the_cpu_it_trains(tmp_path):
    """`--cpu` puts one plain process in the place of the shards; the command line is that of a training on GPUs."""
    done = launch(tmp_path, "fsdp2", "--cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model" / "modules.json").is_file()


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_without_deepspeed_its_file_gets_as_far_as_asking_for_it(tmp_path):
    done = launch(tmp_path, "deepspeed_zero2")
    assert done.returncode and "DeepSpeed is not installed" in done.stderr
