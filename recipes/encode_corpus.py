"""Embed a corpus of any size into shards that survive interruption; a bad row costs its own embedding only.

    python -m recipes.encode_corpus --model out/model --data corpus.parquet --output_dir embeddings

What a corpus can be stands in `recipes/data/corpus.py`: JSONL, JSON, CSV, Parquet, a folder of files, a data set. Rows
are embedded as documents, a shard at a time; a shard is a Parquet file with the columns `id`, `embedding` and `error`,
written whole or not at all. A row that can't be read gets its reason in `error` and no embedding. Started again, the
command goes on with the missing shards; the folder knows the corpus and the model by content, so other texts, changed
pictures or retrained weights are refused, not mixed. Two processes can share a folder. `encode_corpus_ray.py` does the
same on many devices. The work is done in `recipes/data/shards.py`.

The embeddings are those of `encode_document` on the same dicts: keys in the order of the columns (a text before an
image is another input than a text behind it), media by path, and the weights in the type asked for (`--dtype`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from recipes.command_line import option, parse, required, run

PRECISIONS = ("float32", "int8", "binary", "ubinary")


@dataclass
class EncodeConfig:
    """Settings of the encoding."""

    model: str = required("Name or path of a SentenceTransformer.")
    data: list[str] = required("Files of one kind, a folder, or a data set (name or name:split).", "--corpus")
    output_dir: str = required("Folder of the shards.", "--output")
    shard_size: int = option(4096, "Rows of a shard: what an interruption can cost.")
    batch_tokens: int = option(4096, "Padded tokens of a forward pass.")
    dtype: str = option("auto", "Type of the weights; auto: as saved.")
    precision: str = option("float32", f"{', '.join(PRECISIONS)}.")
    truncate_dim: int | None = option(None, "Keep this many dimensions.")
    num_frames: int | None = option(None, "Frames of a video. Default: 8 of a file.")
    max_pixels: int | None = option(None, "Largest area of an image.")
    background: str | None = option(None, "Colour under transparent images.")

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing before anything is loaded."""
        if self.precision not in PRECISIONS or self.shard_size < 1:
            raise ValueError(
                f"precision must be one of {PRECISIONS} and shard_size at least 1, got {self.precision!r} and "
                f"{self.shard_size}."
            )


def main() -> None:
    """Encode with the settings of the command line."""
    config = parse(EncodeConfig, description=__doc__)
    run(lambda: import_module("recipes.data.shards").main(config))


if __name__ == "__main__":
    main()
