"""Train the small backbone that quickstart, tests and benchmarks use, from nothing, on two CPU cores.

    python -m recipes.research.pretrain --output recipes/backbone

A real transformers Qwen2-VL of about 3 M parameters with its own byte-level tokenizer learns to describe and to
answer questions about the scenes of `scenes.py` (image -> text, image + question -> text, text + question -> text).
Reading is learned easy to hard: words start at three letters and grow by one as soon as the recent loss is low.
`--output` gets the fp16 weights, `training.json` (command, seed, versions, time, gate) and `training.png` (learning
curve). `--output`.partial holds the checkpoint that a second call resumes from.

The gate, on words and layouts of the test split: at least 80 % of the words read exactly and at least 95 % of the
colour and position questions answered exactly. A backbone that fails it is not written.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from recipes.command_line import option, parse, run


@dataclass
class PretrainConfig:
    """Settings of one pre-training run; the defaults made the committed backbone."""

    output: str = option("recipes/backbone", "Folder of the backbone.", "--output_dir")
    steps: int = option(2400, "Training steps.")
    learning_rate: float = option(2e-3, "Peak learning rate.")
    warmup_steps: int = option(60, "Steps of linear warm-up.")
    weight_decay: float = option(0.01, "Decoupled weight decay.")
    seed: int = option(0, "Seed of the weights and of the scenes.")
    save_steps: int = option(200, "Steps between two checkpoints, each scored on validation words.")
    max_minutes: float = option(90.0, "Training stops after so many minutes.")


def main() -> None:
    """Pre-train with the settings of the command line."""
    config = parse(PretrainConfig, description=__doc__)
    run(lambda: import_module("recipes.research.pretraining").train(config))


if __name__ == "__main__":
    main()
