"""Shards of a corpus's embeddings on many devices: what `recipes.encode_corpus_ray` does once its flags are read."""

from __future__ import annotations

from typing import Any

try:
    import ray
except ImportError as error:
    raise ImportError(f"this needs an extra, in the checkout: pip install -e '.[ray]' ({error})") from error

from recipes.data.corpus import open_corpus
from recipes.data.shards import Shard, encode_shard, int8_ranges, load_model, plan
from recipes.encode_corpus_ray import RayEncodeConfig


class Encoder:
    """An actor: loads the model once, then encodes one shard per call."""

    def __init__(self, config: RayEncodeConfig) -> None:
        self.config, self.model, self.corpus = config, load_model(config), open_corpus(config.data)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode the shard of a row; adds the number of rows that could not be read."""
        return {**row, "broken": encode_shard(self.model, self.corpus, Shard(**row), self.config)}


def encode(config: RayEncodeConfig) -> tuple[int, int]:
    """Encode what is missing; returns how many shards were written, and how many of their rows could not be read."""
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


def main(config: RayEncodeConfig) -> None:
    """Encode, and say what was written."""
    shards, broken = encode(config)
    print(f"{shards} shards written to {config.output_dir}; {broken} rows in them could not be read (column error).")
