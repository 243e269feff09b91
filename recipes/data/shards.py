"""Shards of a corpus's embeddings: which are missing, how one is made and written."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings
from tqdm.auto import tqdm

from evaluation.atomic_write import atomic_write
from evaluation.embedding.fingerprint import fingerprint
from recipes.data.corpus import Corpus, as_input, is_saved, open_corpus
from recipes.data.corpus_records import would_list
from recipes.data.searches import NOT_FINITE
from recipes.data.tables import BrokenRecordError, as_id
from recipes.encode_corpus import EncodeConfig
from st_btok import encode_rows

_TYPES = {"float32": pa.float32(), "int8": pa.int8(), "binary": pa.int8(), "ubinary": pa.uint8()}
_CALIBRATION = 1000  # rows whose smallest and largest values int8 spreads over; beyond them it is cut off


@dataclass(frozen=True)
class Shard:
    """A range of corpus rows and the file that their embeddings go to."""

    first: int
    stop: int
    path: str


def plan(config: EncodeConfig, corpus: Corpus, model: SentenceTransformer) -> Iterator[Shard]:
    """The shards that are still missing, in order; of a stream they show one by one, as it is read.

    Raises:
        ValueError: If the folder holds shards of another model, corpus or setting, or lies among the files of the
            corpus, which would grow by the shards.
    """
    folder, data = Path(config.output_dir), Path(config.data[0])
    if would_list(data, folder) and not is_saved(data):
        raise ValueError(
            f"the shards must not lie in the folder whose files are the corpus, or they would count as files of it; "
            f"{folder} lies in {data}. Use another --output_dir, or a hidden one, such as {data / '.embeddings'}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _clean_up(folder)
    # What decides the vectors: not where corpus, model and folder are, nor how rows are put together.
    settings = {k: v for k, v in asdict(config).items() if k not in ("model", "data", "output_dir", "batch_tokens")}
    settings = {name: settings[name] for name in EncodeConfig.__dataclass_fields__ if name in settings}
    settings |= {"corpus": corpus.digest, "num_rows": corpus.num_rows, "model": fingerprint(model)}
    manifest = folder / "corpus.json"
    if not manifest.exists():
        atomic_write(manifest, lambda path: path.write_text(json.dumps(settings, indent=2)), replace=False)
    found = json.loads(manifest.read_text())
    other = {key: (found.get(key), value) for key, value in settings.items() if found.get(key) != value}
    if other:
        raise ValueError(
            f"{folder} holds shards of another corpus, model or setting (there, now): {other}. Use another "
            "--output_dir."
        )
    return _missing(config, corpus)


def _missing(config: EncodeConfig, corpus: Corpus) -> Iterator[Shard]:
    """Ranges without a file. Where a stream ends is written down: asking it again would read all of it."""
    end = Path(config.output_dir) / "end.json"
    known = json.loads(end.read_text()) if corpus.num_rows is None and end.exists() else corpus.num_rows
    for number, first in enumerate(count(0, config.shard_size)):
        path = Path(config.output_dir) / f"shard-{number:06d}.parquet"
        if known is not None and first >= known:
            return
        if path.exists():
            continue
        if not corpus.has(first):
            atomic_write(end, lambda place, rows=first: place.write_text(json.dumps(rows)))
            return
        stop = first + config.shard_size
        yield Shard(first, stop if known is None else min(stop, known), str(path))


def _clean_up(folder: Path) -> None:
    """Remove what processes of this machine left behind when they were killed; those that run keep theirs."""
    for path in folder.glob(f"*.{socket.gethostname()}.*.unfinished"):
        if not Path(f"/proc/{path.name.split('.')[-2]}").exists():
            path.unlink(missing_ok=True)


def encode_shard(model: SentenceTransformer, corpus: Corpus, shard: Shard, config: EncodeConfig) -> int:
    """Embed the rows of a shard and write its file in one step; returns how many could not be embedded."""
    ids: list[str] = []
    vectors, errors = _embed(model, corpus, shard.first, shard.stop, config, ids)
    if corpus.num_rows is not None and len(ids) < shard.stop - shard.first:
        raise ValueError(
            f"the corpus must stay as it is while it is embedded: rows {shard.first} to {shard.stop} were counted, "
            f"{len(ids)} of them are left. Start again, with another --output_dir."
        )
    kept = [row for row, error in enumerate(errors) if not error]
    stored: list[Any] = [None] * len(errors)
    if kept:
        values = np.stack([vectors[row] for row in kept])
        if config.precision == "int8":
            ranges = int8_ranges(model, corpus, config)
            values = np.clip(
                values, ranges[0], ranges[1]
            )  # beyond the ranges, int8 would begin again at the other end
            values = quantize_embeddings(values, "int8", ranges=ranges)
        elif config.precision != "float32":
            values = quantize_embeddings(values, config.precision)
        for row, value in zip(kept, values, strict=True):
            stored[row] = value
    columns = {"id": ids, "embedding": pa.array(stored, pa.list_(_TYPES[config.precision])), "error": errors}
    atomic_write(Path(shard.path), lambda path: pq.write_table(pa.table(columns), path))
    return sum(map(bool, errors))


def _embed(
    model: SentenceTransformer, corpus: Corpus, first: int, stop: int, config: EncodeConfig, ids: list[str]
) -> tuple[dict[int, np.ndarray], list[str]]:
    """Vectors by row, counted from `first`, and the reason of every bad row; `ids` is filled."""

    def inputs() -> Iterator[Any]:
        for number, record in enumerate(corpus.records(first, stop), start=first):
            name = as_id(record.get("id")) if isinstance(record, dict) else None
            ids.append(_storable(number if name is None else name))
            try:
                value: Any = as_input(record, corpus.folder)
            except BrokenRecordError as error:
                value = error
            yield value

    reasons: dict[int, str] = {}
    vectors = {}
    done = encode_rows(
        model,
        inputs(),
        task="document",
        batch_tokens=config.batch_tokens,
        truncate_dim=config.truncate_dim,
        num_frames=config.num_frames,
        max_pixels=config.max_pixels,
        background=config.background,
    )
    for row in done:
        if row.reason:
            reasons[row.row] = _storable(row.reason)
            continue
        vector = row.embedding.float().cpu().numpy()
        if np.isfinite(vector).all():
            vectors[row.row] = vector
        else:
            reasons[row.row] = NOT_FINITE
    return vectors, [reasons.get(row, "") for row in range(len(ids))]  # a stream can end before `stop`


def _storable(value: Any) -> str:
    """Text that UTF-8 can hold: half a character of a broken line stays visible as its escape."""
    return str(value).encode(errors="backslashreplace").decode()


def int8_ranges(model: SentenceTransformer, corpus: Corpus, config: EncodeConfig) -> np.ndarray:
    """(2, D): smallest and largest values of the first thousand rows, computed once for the whole folder."""
    place = Path(config.output_dir) / "int8_ranges.npy"
    if not place.exists():
        vectors, _ = _embed(model, corpus, 0, _CALIBRATION, config, [])
        if not vectors:
            raise ValueError(f"int8 needs a good row among the first {_CALIBRATION}, there is none. Use float32.")
        values = np.stack(list(vectors.values()))

        def write(path: Path) -> None:
            with path.open("wb") as stream:
                np.save(stream, np.stack([values.min(0), values.max(0)]))

        atomic_write(place, write)
    ranges = np.load(place)
    width = ranges[1] - ranges[0]
    flat = int((width <= 1e-6 * np.abs(ranges).max()).sum())  # equal rows differ by rounding
    if flat:
        raise ValueError(
            f"int8 needs values that differ among the first {_CALIBRATION} rows, but {flat} of {len(width)} "
            "dimensions hold one value there, so all vectors would be the same in them. Use float32, or put other "
            "rows first."
        )
    return ranges


def load_model(config: EncodeConfig) -> SentenceTransformer:
    """The embedder."""
    return SentenceTransformer(config.model, model_kwargs={"dtype": config.dtype})


def read_embeddings(output: str) -> Iterator[dict[str, Any]]:
    """All rows of all shards, in the order of the corpus."""
    for path in sorted(Path(output).glob("shard-*.parquet")):
        yield from pq.read_table(path).to_pylist()


def main(config: EncodeConfig) -> None:
    """Encode what is missing, in this process."""
    corpus, model = open_corpus(config.data), load_model(config)
    shards = plan(config, corpus, model)
    written = broken = 0
    for shard in tqdm(shards, desc="shards"):
        if not Path(shard.path).exists():  # another process may have written it meanwhile
            broken += encode_shard(model, corpus, shard, config)
            written += 1
    print(f"{written} shards written to {config.output_dir}; {broken} rows in them could not be read (column error).")
    if corpus.others:
        print(f"Columns that are neither text, image nor video were not embedded: {', '.join(sorted(corpus.others))}.")
