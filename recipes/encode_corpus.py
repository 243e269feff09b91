"""Embed a corpus into shards that survive interruption, with plain sentence-transformers.

    python -m recipes.encode_corpus --model out/model --corpus corpus.parquet --output embeddings

The corpus is a parquet or JSONL file (or several) with any of the columns `text`, `image` (an image column, or paths
relative to the first file) and `video` (paths of video files), and optionally `id`. Rows are embedded as documents,
a shard at a time; a shard is a parquet file with the columns `id`, `embedding` (float32) and `error`, written whole
or not at all. Started again, the command goes on with the missing shards. A row that can't be read gets its reason in
`error` and no embedding. `encode_corpus_ray.py` does the same on many devices.

Nothing here imports `st_btok`: a trained model needs sentence-transformers alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, load_dataset
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import HfArgumentParser

_BATCHES_AT_ONCE = 4  # decoded together; sentence-transformers sorts them by length
_SHARD = Features({"id": Value("string"), "embedding": List(Value("float32")), "error": Value("string")})


@dataclass
class EncodeConfig:
    """Settings of the encoding."""

    model: str = field(metadata={"help": "Name or path of a SentenceTransformer."})
    corpus: list[str] = field(metadata={"help": "Parquet or JSONL files."})
    output: str = field(metadata={"help": "Folder of the shards."})
    shard_size: int = field(default=4096, metadata={"help": "Rows of a shard: what an interruption can cost."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a forward pass."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights."})


@dataclass(frozen=True)
class Shard:
    """A range of corpus rows and the file that their embeddings go to."""

    first: int
    stop: int
    path: str


def open_corpus(files: list[str]) -> Dataset:
    """The corpus as a memory-mapped table, images undecoded.

    Raises:
        ValueError: No `text`, `image` or `video` column.
    """
    kind = "parquet" if Path(files[0]).suffix == ".parquet" else "json"
    table = load_dataset(kind, data_files=files, split="train")
    if not {"text", "image", "video"} & set(table.column_names):
        raise ValueError(f"the corpus must have a column text, image or video, but has {table.column_names}.")
    if isinstance(table.features.get("image"), Image):
        table = table.cast_column("image", Image(decode=False))
    return table


def plan(config: EncodeConfig, num_rows: int) -> list[Shard]:
    """The shards that are still missing.

    Raises:
        ValueError: The folder holds shards of another model, corpus or shard size.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in asdict(config).items() if key not in ("output", "batch_size")}
    settings["num_rows"] = num_rows
    manifest = folder / "corpus.json"
    if manifest.exists() and (found := json.loads(manifest.read_text())) != settings:
        other = {key: (found.get(key), value) for key, value in settings.items() if found.get(key) != value}
        raise ValueError(
            f"{folder} holds shards made with other settings (there, now): {other}. Use another --output."
        )
    manifest.write_text(json.dumps(settings, indent=2))
    shards = [
        Shard(first, min(first + config.shard_size, num_rows), str(folder / f"shard-{number:06d}.parquet"))
        for number, first in enumerate(range(0, num_rows, config.shard_size))
    ]
    return [shard for shard in shards if not Path(shard.path).exists()]


def encode_shard(model: SentenceTransformer, table: Dataset, shard: Shard, folder: str, batch_size: int) -> int:
    """Embed the rows of a shard and write its file in one step.

    Args:
        model: The embedder.
        table: The corpus.
        shard: The rows and the file.
        folder: Where paths in the corpus start from.
        batch_size: Rows of a forward pass.

    Returns:
        Number of rows that could not be read.
    """
    columns: dict[str, list[Any]] = {"id": [], "embedding": [], "error": []}
    for start in range(shard.first, shard.stop, _BATCHES_AT_ONCE * batch_size):
        rows = table.select(range(start, min(start + _BATCHES_AT_ONCE * batch_size, shard.stop)))
        inputs, errors = [], []
        for record in rows:
            try:
                inputs.append(_as_input(record, Path(folder)))
                errors.append("")
            except (OSError, SyntaxError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")
        found = iter(model.encode_document(inputs, batch_size=batch_size, show_progress_bar=False) if inputs else ())
        columns["id"] += [str(record.get("id", start + i)) for i, record in enumerate(rows)]
        columns["embedding"] += [None if error else next(found) for error in errors]
        columns["error"] += errors
    unfinished = f"{shard.path}.{os.getpid()}.unfinished"
    Dataset.from_dict(columns, features=_SHARD).to_parquet(unfinished)
    os.replace(unfinished, shard.path)
    return sum(map(bool, columns["error"]))


def _as_input(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if image := record.get("image"):
        stored = {"path": str(folder / image), "bytes": None} if isinstance(image, str) else image
        inputs["image"] = Image().decode_example(stored).convert("RGB")
    if record.get("video"):
        inputs["video"] = str(folder / record["video"])
        if not Path(inputs["video"]).is_file():
            raise FileNotFoundError(f"no video {inputs['video']}")
    if (record.get("text") or "").strip():
        inputs["text"] = record["text"]
    if not inputs:
        raise ValueError("the row is empty: neither text nor media")
    return inputs


def load_model(config: EncodeConfig) -> SentenceTransformer:
    """The embedder."""
    return SentenceTransformer(config.model, model_kwargs={"dtype": config.dtype})


def read_embeddings(output: str) -> Iterator[dict[str, Any]]:
    """All rows of all shards, in the order of the corpus."""
    for path in sorted(Path(output).glob("shard-*.parquet")):
        yield from Dataset.from_parquet(str(path))


def main() -> None:
    """Encode what is missing, in this process."""
    (config,) = HfArgumentParser(EncodeConfig).parse_args_into_dataclasses()
    table = open_corpus(config.corpus)
    shards = plan(config, len(table))
    model = load_model(config) if shards else None
    folder = str(Path(config.corpus[0]).parent)
    broken = sum(encode_shard(model, table, s, folder, config.batch_size) for s in tqdm(shards, desc="shards"))
    print(f"{len(shards)} shards written to {config.output}; {broken} rows in them could not be read (column error).")


if __name__ == "__main__":
    main()
