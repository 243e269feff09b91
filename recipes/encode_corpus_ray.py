"""`encode_corpus.py` on many devices: one Ray actor per device, each taking the next missing shard.

    pip install -e ".[ray]"
    python -m recipes.encode_corpus_ray --model out/model --data c.parquet --output_dir embeddings --actors 8 --gpus 1

Corpus and output must be on a file system that all nodes see. A lost actor or an interrupted run costs the shards in
work: the command goes on with the missing ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from recipes.command_line import option, parse, run
from recipes.data.corpus import open_corpus
from recipes.data.shards import Shard, encode_shard, int8_ranges, load_model, plan
from recipes.encode_corpus import EncodeConfig


@dataclass
class RayEncodeConfig(EncodeConfig):
    """Settings of the encoding and of its actors."""

    actors: int = option(1, "Actors; each holds the model.")
    gpus: float = option(0.0, "GPUs of an actor; 0: CPU.")


class Encoder:
    """An actor: loads the model once, then encodes one shard per call."""

    def __init__(self, config: RayEncodeConfig) -> None:
        self.config, self.model, self.corpus = config, load_model(config), open_corpus(config.data)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode the shard of a row; adds the number of rows that could not be read."""
        return {**row, "broken": encode_shard(self.model, self.corpus, Shard(**row), self.config)}


def encode(config: RayEncodeConfig) -> tuple[int, int]:
    """Encode what is missing; the number of shards written, and of rows in them that could not be read."""
    corpus = open_corpus(config.data)
    if corpus.num_rows is None:
        raise ValueError(
            f"actors share a corpus by its row numbers, but {config.data[0]!r} is a stream, which has to be read in "
            "order. Save it first: datasets.load_dataset(...).save_to_disk(folder), or use recipes.encode_corpus."
        )
    model = load_model(config)
    shards = list(plan(config, corpus, model))
    if shards and config.precision == "int8":
        int8_ranges(model, corpus, config)  # before the actors, which would each compute them
    del model
    if not shards:
        return 0, 0
    work = ray.data.from_items([vars(shard) for shard in shards], override_num_blocks=len(shards))
    done = work.map(
        Encoder,
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(config.actors, len(shards))),
        num_gpus=config.gpus,
    )
    return len(shards), sum(row["broken"] for row in done.iter_rows())


def encode_and_report(config: RayEncodeConfig) -> None:
    """Encode, and say what was written."""
    shards, broken = encode(config)
    print(f"{shards} shards written to {config.output_dir}; {broken} rows in them could not be read (column error).")


def main() -> None:
    """Encode with the settings of the command line."""
    config = parse(RayEncodeConfig, description=__doc__)
    run(lambda: encode_and_report(config))


if __name__ == "__main__":
    main()
