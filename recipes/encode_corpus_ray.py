"""`encode_corpus.py` on many devices: one Ray actor per device, each taking the next missing shard.

    pip install -e '.[ray]'
    python -m recipes.encode_corpus_ray --model out/model --data c.parquet --output_dir embeddings --actors 8 --gpus 1

Corpus and output must be on a file system that all nodes see. A lost actor or an interrupted run costs the shards in
work: the command goes on with the missing ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from recipes.command_line import option, parse, run
from recipes.encode_corpus import EncodeConfig


@dataclass
class RayEncodeConfig(EncodeConfig):
    """Settings of the encoding and of its actors."""

    actors: int = option(1, "Actors; each holds the model.")
    gpus: float = option(0.0, "GPUs of an actor; 0: CPU.")


def main() -> None:
    """Encode with the settings of the command line."""
    config = parse(RayEncodeConfig, description=__doc__)
    run(lambda: import_module("recipes.data.ray_shards").main(config))


if __name__ == "__main__":
    main()
