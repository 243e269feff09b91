"""A `mean` model's nearest `last` model, by a short distillation on unlabelled rows.

    python -m recipes.research.distill_to_last_token MODEL OUT --data rows.jsonl

Engines read `readout="last"` by themselves (docs/serve.md); MODEL averages its BToks. The copy starts from MODEL's
weights, reads the last BTok, and learns to give MODEL's vectors (1 - cosine) for the rows of a JSONL file with `text`,
`image` (a path) or both. One row in ten is held out; on those the loss of quality is printed before and after: the
cosine to MODEL's vector, and how many of the ten nearest among all rows are still the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from recipes.command_line import ArgumentDefaultsRawHelp, CommandParser, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Distil with the settings of the command line."""
    parser = CommandParser(
        prog="python -m recipes.research.distill_to_last_token",
        description=__doc__,
        formatter_class=ArgumentDefaultsRawHelp,
    )
    parser.add_argument("model", help="path or hub name of a model with the mean readout")
    parser.add_argument("out", help="folder of the new model")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with text, image (a path) or both a row")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=32, help="rows a step")
    parser.add_argument("--learning_rate", "--learning-rate", type=float, default=1e-4, help="falls to 0 linearly")
    options = parser.parse_args(arguments)
    run(lambda: import_module("recipes.research.distillation").main(options))


if __name__ == "__main__":
    main()
