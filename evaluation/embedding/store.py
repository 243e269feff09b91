"""Embeddings by content: in memory for one run, in shards on disk so that a killed run loses at most one shard.

A vector is found by its space (checkpoint, prompt, settings; see `encoding.MediaFirstEncoder`) and the hash of what
the model saw, so candidates that several data sets share are encoded once, a changed checkpoint or a changed picture
never meets an old vector, and a data set that changed in part is encoded in part. Every shard is a safetensors file
written beside its place and then renamed; one that can't be read in full is ignored, and its inputs are encoded again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

logger = logging.getLogger(__name__)

KEY_BYTES = 16


def content_key(*parts: bytes | str) -> bytes:
    """Hash of some parts, 16 bytes; no two different lists of parts share one."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class EmbeddingStore:
    """Embeddings by space and content, shared by the tasks of one benchmark.

    Args:
        folder: Where shards are kept, `<folder>/<space>/<hash>.safetensors`; default: memory only.
        max_items: Number of vectors to keep in memory; the oldest leave first (and, with a folder, are read again).
            200,000 vectors of 1,536 numbers are 1.2 GB.
        fresh: Leave what is in the folder unread, and replace it.
    """

    def __init__(self, folder: str | Path | None = None, max_items: int = 200_000, *, fresh: bool = False) -> None:
        self._fresh = fresh
        self.folder = None if folder is None else Path(folder)
        self._max_items = max_items
        self._vectors: dict[tuple[bytes, bytes], np.ndarray] = {}
        self._shards: dict[bytes, dict[bytes, Path]] = {}  # space -> content -> file

    def __len__(self) -> int:
        """Number of vectors in memory."""
        return len(self._vectors)

    def get(self, space: bytes, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """The vectors that are held.

        Args:
            space: What made the vectors.
            keys: Contents asked for.

        Returns:
            Content -> float32 (width,), without the contents that are not held.
        """
        found = {key: self._vectors[space, key] for key in keys if (space, key) in self._vectors}
        shards = self._index(space)
        files = {shards[key] for key in keys if key not in found and key in shards}
        wanted = set(keys)
        for file in sorted(files):
            found |= {key: vector for key, vector in _read(file).items() if key in wanted}
        self._remember(space, found)
        return found

    def put(self, space: bytes, vectors: Mapping[bytes, np.ndarray]) -> None:
        """Keep vectors; with a folder they are on disk, as one shard, when this returns.

        Args:
            space: What made the vectors.
            vectors: Content -> float32 (width,).
        """
        self._remember(space, vectors)
        if self.folder is None or not vectors:
            return
        file = self._place(space) / f"{content_key(*sorted(vectors)).hex()}.safetensors"
        _write(file, vectors)
        self._index(space).update(dict.fromkeys(vectors, file))

    def _remember(self, space: bytes, vectors: Mapping[bytes, np.ndarray]) -> None:
        for key, vector in vectors.items():
            self._vectors[space, key] = vector
        while len(self._vectors) > self._max_items:
            del self._vectors[next(iter(self._vectors))]

    def _place(self, space: bytes) -> Path:
        return (self.folder or Path()) / space.hex()

    def _index(self, space: bytes) -> dict[bytes, Path]:
        """Content -> shard of one space, read from the disk once."""
        if space not in self._shards:
            files = sorted(self._place(space).glob("*.safetensors")) if self.folder else []
            if self._fresh:  # else a later run would read old vectors beside the new ones
                for file in files:
                    file.unlink()
                files = []
            self._shards[space] = {key: file for file in files for key in _read(file)}
        return self._shards[space]


def _write(file: Path, vectors: Mapping[bytes, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    keys = np.frombuffer(b"".join(vectors), np.uint8).reshape(-1, KEY_BYTES)
    partial = file.with_suffix(f".{os.getpid()}.partial")  # never read, and never another process'
    try:
        save_file({"keys": keys, "vectors": np.stack(list(vectors.values()))}, partial)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())  # or a power cut could leave the name without the content
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path) -> dict[bytes, np.ndarray]:
    """Content -> vector of one shard; nothing, with a warning, for a file that is not whole."""
    try:
        tensors = load_file(file)
        return dict(zip(map(bytes, tensors["keys"]), tensors["vectors"], strict=True))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("embeddings in %s can't be read and are made again: %s", file, error)
        return {}
