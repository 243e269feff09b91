"""A folder of odd files, one of each kind: the right vector or the reason, by whatever way a file comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps, features

from recipes.data.corpus import open_corpus
from recipes.data.shards import encode_shard, plan, read_embeddings
from recipes.data.user_data import load_user_data
from recipes.encode_corpus import EncodeConfig
from recipes.search.folder import KIND_OF_SUFFIX
from recipes.search.index import update
from recipes.search.store import LanceStore
from st_btok import encode_checked, open_image, read_video, rgb_image
from tests.backbones import picture
from tests.st_btok.inputs.test_images import drawn_text, png_header, psd, with_chunk
from tests.st_btok.inputs.test_videos import RISING, copy_movie, write_movie


def images(folder: Path) -> dict[str, Any]:
    """Files, and what each shows (upright RGB), or a part of the reason why it can't be read."""
    rgb, ink = picture(56, 28, 1), drawn_text()
    exif = Image.Exif()
    exif[0x0112] = 7  # mirrored and turned
    rgb.save(folder / "plain.png")
    found: dict[str, Any] = {"plain.png": rgb}
    ink.save(folder / "ink.png", transparency=1)
    ink.save(folder / "ink.gif", transparency=1)
    found |= {"ink.png": ink.convert("RGB"), "ink.gif": ink.convert("RGB")}
    rgb.save(folder / "turned.png", exif=exif)
    found["turned.png"] = rgb.transpose(Image.Transpose.TRANSVERSE)
    rgb.save(folder / "phone.jpg", exif=exif)
    found["phone.jpg"] = ImageOps.exif_transpose(Image.open(folder / "phone.jpg"))
    rgb.convert("CMYK").save(folder / "print.tif")
    found["print.tif"] = rgb.convert("CMYK").convert("RGB")
    deep = np.arange(28 * 56, dtype=np.uint16).reshape(28, 56) * 40
    Image.fromarray(deep).save(folder / "deep.png")
    found["deep.png"] = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if features.check("avif"):
        rgb.save(folder / "new.avif", quality=100, subsampling="4:4:4")
        found["new.avif"] = Image.open(folder / "new.avif").convert("RGB")
    (folder / "layers.psd").write_bytes(psd(rgb))
    found["layers.psd"] = rgb
    data = (folder / "plain.png").read_bytes()
    (folder / "noted.png").write_bytes(with_chunk(data, b"tEXt", b"a\0b", True, b"IDAT"))
    found["noted.png"] = rgb
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "words.jpg").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_header(50_000, 50_000))
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (folder / "torn.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64))
    return found | {
        "cut.png": "truncated",
        "words.jpg": "is not an image",
        "empty.png": "is not an image",
        "bomb.png": "Shrink it first",
        "script.png": "is PostScript",
        "torn.heic": "HEI",
    }


def films(folder: Path) -> dict[str, Any]:
    """The same for videos: frames of `RISING`, as their numbers."""
    options = {"g": "20", "bf": "3"}
    whole = write_movie(folder / "whole.mp4", RISING, codec="libx264", rate=30, options=options)
    copy_movie(whole, folder / "later.mp4", shift=0.5)
    (folder / "torn.mp4").write_bytes(whole.read_bytes()[:2000])
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nwhole.mp4\n")
    return {
        "whole.mp4": [0, 8, 16, 25, 33, 42, 50, 59],
        "later.mp4": [15 + number for number in (0, 6, 12, 18, 25, 31, 37, 44)],
        "torn.mp4": "can't be decoded as a video",
        "list.mp4": "can't be decoded as a video",
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory, btok_model):
    """The folder, what its files show, and the vectors that plain `encode` gives of what they show."""
    folder = tmp_path_factory.mktemp("odd")
    shown, model = images(folder), btok_model("qwen2_vl")
    good = {name: value for name, value in shown.items() if not isinstance(value, str)}
    vectors = dict(zip(good, model.encode([{"image": value} for value in good.values()]), strict=True))
    moving = films(folder)
    for name, numbers in moving.items():
        if not isinstance(numbers, str):
            result = encode_checked(model, [{"video": str(folder / name)}])
            vectors[name] = result.embeddings[0]
    return folder, model, {**shown, **moving}, vectors


def kind_of(name: str) -> str:
    return "video" if name.endswith(".mp4") else "image"


def agrees(shown: dict[str, Any], vectors: dict[str, Any], found: dict[str, Any]) -> None:
    """Every file has the vector of what it shows, or its reason."""
    assert found.keys() == shown.keys()
    for name, value in found.items():
        if isinstance(shown[name], str):
            assert isinstance(value, str) and shown[name] in value, (name, value)
        else:
            assert not isinstance(value, str), (name, value)
            assert np.abs(np.asarray(value) - vectors[name]).max() < 1e-5, name


def test_films_show_the_right_frames(odd):
    folder, _, shown, _ = odd
    for name in ("whole.mp4", "later.mp4"):
        levels = read_video(folder / name).frames[:, :, :28].mean((1, 2, 3)) / 4
        assert np.abs(levels.round() - shown[name]).max() <= 1


@pytest.mark.parametrize("form", ["str", "Path", "named", "bytes"])
def test_checked_encoding(odd, form):
    folder, model, shown, vectors = odd
    forms = {
        "str": lambda path: str(path),
        "Path": lambda path: path,
        "named": lambda path: {kind_of(path.name): str(path)},
        "bytes": lambda path: {kind_of(path.name): path.read_bytes()},
    }
    result = encode_checked(model, [forms[form](folder / name) for name in shown], "skip")
    names = list(shown)
    found = {names[row]: vector for row, vector in zip(result.rows, result.embeddings, strict=True)}
    agrees(shown, vectors, found | {names[bad.row]: bad.reason for bad in result.skipped})


def test_corpus_encoding(odd, tmp_path):
    folder, model, shown, vectors = odd
    rows = [json.dumps({"id": name, kind_of(name): str(folder / name)}) for name in shown]
    (tmp_path / "odd.jsonl").write_text("\n".join(rows))
    config = EncodeConfig("m", [str(tmp_path / "odd.jsonl")], str(tmp_path / "out"))
    corpus = open_corpus(config.data)
    for shard in plan(config, corpus, model):
        encode_shard(model, corpus, shard, config)
    found = {row["id"]: row["error"] or row["embedding"] for row in read_embeddings(config.output_dir)}
    agrees(shown, vectors, found)


def test_the_check_of_training_rows(odd, tmp_path, monkeypatch):
    folder, model, shown, vectors = odd
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"query": name, f"positive_{kind_of(name)}": str(folder / name)} for name in shown]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (source,) = load_user_data([str(tmp_path / "pairs.jsonl")])
    kept = source.dataset()[:]
    inputs = [{key: value for key, value in row.items() if key != "text"} for row in kept["positive"]]
    names = [row["text"] for row in kept["query"]]
    found = dict(zip(names, encode_checked(model, inputs).embeddings, strict=True))
    every = list(shown)
    agrees(shown, vectors, found | {every[bad.index]: bad.reason for bad in source.broken})


def test_the_search_index(odd, tmp_path):
    folder, model, shown, vectors = odd
    store = LanceStore(str(tmp_path / "lance"), 32)
    report = update(store, model, folder, progress=False)
    listed = [name for name in shown if Path(name).suffix in KIND_OF_SUFFIX]
    found: dict[str, Any] = {name: report.left_out[name] for name in listed if name in report.left_out}
    assert report.written | report.left_out.keys() >= set(listed) and not report.written & found.keys()
    for name in report.written & vectors.keys():
        (hit,) = [hit for hit in store.search(vectors[name], 50) if hit.row["path"] == name]
        found[name] = store.vector(hit.row["id"])
    agrees({name: shown[name] for name in listed}, vectors, found)


def test_explain_sees_what_encoding_sees(odd):
    """It reads images by `rgb_image`, which opens what `open_image` opens."""
    folder, _, shown, _ = odd
    for name, value in shown.items():
        if isinstance(value, Image.Image):
            assert np.array_equal(np.asarray(rgb_image(folder / name)), np.asarray(value)), name
            assert open_image(folder / name).width
        elif isinstance(value, str) and kind_of(name) == "image":
            with pytest.raises(ValueError, match=value):
                rgb_image(folder / name)
