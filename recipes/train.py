"""Train a bottleneck-token embedder on the MMEB-V2 mix, on your own pairs, or on both.

    python -m recipes.train --backbone Qwen/Qwen2-VL-2B-Instruct --data pairs.jsonl --output_dir out
    accelerate launch -m recipes.train --preset qwen2-vl-2b --mmeb_root data --output_dir out
    python -m recipes.train --preset qwen2-vl-2b --mmeb_root data --output_dir out --learning_rate 1e-4 --resume

`--help` shows the settings (`training/settings.py`): ours first, then every training argument of
sentence-transformers. A preset (`training/presets.py`) sets the authors' values; what the command line gives wins over
it. Formats of your own pairs: `data/user_data.py`; folders of the MMEB-V2 mix: `data/mmeb_train.py`.

1. Reads and checks the data. Broken rows are counted, listed in `<output_dir>/skipped_rows.jsonl` and left out, or are
   an error (`--on_error raise`).
   With `--stream` rows are read and checked while training instead (`data/streaming.py`): for corpora that don't fit.
2. Holds out validation rows that share no content with the rest (`--validation_size`); test sets are never read.
3. Mines hard negatives if asked to (`--hard_negatives mine --miner MODEL`).
4. Builds the model, with LoRA or DoRA (`--tuning`), and trains it with checkpoints, progress bar and evaluation
   of the held-out rows in both directions, before and after training and in between (`--eval_strategy steps`), written
   to `<output_dir>/validation.jsonl`; `--resume` goes on from the newest whole checkpoint (`training/resume.py`).
5. Writes `<output_dir>/model`, which plain `SentenceTransformer` loads, with a model card (data, settings, scores).
"""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Sequence
from importlib import import_module

from recipes.command_line import Parser, run
from recipes.training.settings import (
    DataSettings,
    LossSettings,
    ModelSettings,
    RunSettings,
    TrainerDefaults,
    check_choices,
    check_shares,
    trainer_flags,
)


def check_flags(arguments: Sequence[str] | None = None) -> None:
    """Answer `--help` and flags that don't exist before anything heavy is imported."""
    parser = Parser(
        (RunSettings, DataSettings, ModelSettings, LossSettings, TrainerDefaults),
        usage="python -m recipes.train --backbone NAME --data pairs.jsonl --output_dir out [further settings]",
    )
    others = parser.add_argument_group("further training arguments of sentence-transformers and transformers")
    for name, text in trainer_flags().items():
        if name not in TrainerDefaults.__dataclass_fields__:
            names = [f"--{name}", *([f"--{name.replace('_', '-')}"] if "_" in name else [])]
            # Their types are known to the Trainer only, which reads them again.
            others.add_argument(*names, nargs="*", help=text.replace("%", "%%"), default="the Trainer's")
            others.add_argument(f"--no_{name}", nargs="*", help=SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        check_choices(given)
        check_shares(given)
    except ValueError as error:
        parser.error(str(error))
    if not (given.backbone or given.preset):
        parser.error("pass --backbone (a model name or path) or --preset")
    if not (given.data or given.mmeb_root):
        parser.error("there is nothing to train on: pass --data (your pairs) or --mmeb_root")


def main() -> None:
    """Train with the settings of the command line."""
    check_flags()
    run(lambda: import_module("recipes.training.run").main())


if __name__ == "__main__":
    main()
