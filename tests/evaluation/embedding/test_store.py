"""Embeddings survive the process that made them, whole or not at all."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from evaluation.embedding.store import EmbeddingStore, content_key

SPACE, OTHER = content_key("model a"), content_key("model b")


def vectors(*names: str) -> dict[bytes, np.ndarray]:
    return {content_key(name): np.full(3, ord(name), np.float32) for name in names}


def test_a_new_store_on_the_same_folder_has_what_was_put(tmp_path):
    EmbeddingStore(tmp_path).put(SPACE, vectors("a", "b"))
    EmbeddingStore(tmp_path).put(SPACE, vectors("c"))
    found = EmbeddingStore(tmp_path).get(SPACE, list(vectors("c", "a", "z")))
    assert found.keys() == vectors("a", "c").keys()
    assert all(np.array_equal(found[key], vector) for key, vector in vectors("a", "c").items())
    assert not EmbeddingStore(tmp_path).get(OTHER, list(vectors("a"))), "another checkpoint has its own"
    assert not EmbeddingStore().get(SPACE, list(vectors("a")))


@pytest.mark.parametrize("damage", ["cut", "empty", "partial"])
def test_a_half_written_shard_is_not_read(tmp_path, damage, caplog):
    store = EmbeddingStore(tmp_path)
    store.put(SPACE, vectors("a"))
    store.put(SPACE, vectors("b"))
    file = next(path for path in tmp_path.rglob("*.safetensors") if content_key(content_key("b")).hex() in path.name)
    data = file.read_bytes()
    if damage == "partial":  # killed before the renaming
        file.rename(file.with_suffix(".1.partial"))
    else:
        file.write_bytes(data[: len(data) - 4] if damage == "cut" else b"")
    with caplog.at_level(logging.WARNING):
        found = EmbeddingStore(tmp_path).get(SPACE, list(vectors("a", "b")))
    assert found.keys() == vectors("a").keys()
    assert (file.name in caplog.text) == (damage != "partial")


def test_a_shard_that_is_damaged_while_in_use_is_made_again(tmp_path):
    EmbeddingStore(tmp_path).put(SPACE, vectors("a"))
    store = EmbeddingStore(tmp_path)
    assert not store.get(SPACE, [])  # the index is read
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"")
    assert not store.get(SPACE, list(vectors("a")))
    store.put(SPACE, vectors("a"))
    assert EmbeddingStore(tmp_path).get(SPACE, list(vectors("a")))


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    store = EmbeddingStore(tmp_path)
    with pytest.raises(ValueError, match="same shape"):
        store.put(SPACE, {content_key("a"): np.zeros(3, np.float32), content_key("b"): np.zeros(4, np.float32)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_memory_is_bounded_and_the_disk_has_the_rest(tmp_path):
    store = EmbeddingStore(tmp_path, max_items=2)
    for name in "abcd":
        store.put(SPACE, vectors(name))
    assert len(store) == 2
    assert len(store.get(SPACE, list(vectors(*"abcd")))) == 4
    assert len(store) == 2
    forgetful = EmbeddingStore(max_items=2)
    forgetful.put(SPACE, vectors(*"abc"))
    assert forgetful.get(SPACE, list(vectors(*"abc"))).keys() == vectors("b", "c").keys()


def test_keys_tell_every_list_of_parts_apart():
    keys = {content_key(*parts) for parts in (("ab",), ("a", "b"), ("", "ab"), ("ab", ""), (b"a", "b", ""))}
    assert len(keys) == 5 and content_key("a") == content_key(b"a")


def test_a_fresh_store_leaves_no_old_vector_behind(tmp_path):
    """Its shards hold other inputs than the old ones, so they would lie side by side."""
    old = vectors("a", "b")
    EmbeddingStore(tmp_path).put(b"space", old)
    fresh = EmbeddingStore(tmp_path, fresh=True)
    assert not fresh.get(b"space", list(old))
    new = {key: value + 1 for key, value in old.items()}
    for key in new:
        fresh.put(b"space", {key: new[key]})
    found = EmbeddingStore(tmp_path).get(b"space", list(old))
    assert all((found[key] == new[key]).all() for key in new)
