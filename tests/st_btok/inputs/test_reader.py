"""One input at a time: what is accepted, what it becomes, and what the refusals say."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_btok.inputs.fetch import MediaOptions
from st_btok.inputs.reader import InputReader, reader_for
from tests.backbones import clip, picture, sound

ALL = ("text", "image", "video", "audio", "message")
READER = InputReader(modalities=ALL)
HEADERS = InputReader(modalities=ALL, decode=False)


@pytest.fixture
def png(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    picture(56, 28, 1).save(path)
    return path


def user(*parts: object) -> list:
    return [{"role": "user", "content": list(parts)}]


def equal(left: object, right: object) -> bool:
    """Deep equality over pictures, arrays, dicts and lists."""
    if isinstance(left, Image.Image | np.ndarray | torch.Tensor):
        return type(left) is type(right) and np.array_equal(np.asarray(left), np.asarray(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "a",
        "a\0b",
        "http://example.com/page",
        "see figure.png",
        "3.5",
        "x" * 5000,
        "http://[",
        "data:,a",
        "a.b\0.c",
        "a\nb.png x",
    ],
)
def test_text_is_left_alone(value):
    assert READER.read(value) == value
    assert READER.read({"text": value}) == {"text": value}


def test_media_alone_and_in_dicts(png):
    shown = picture(56, 28, 1)
    for value in (png, str(png), shown, np.asarray(shown)):
        assert equal(READER.read(value), shown)
    for value in (png, str(png), png.read_bytes()):
        assert equal(READER.read({"image": value, "text": "a"}), {"image": shown, "text": "a"})
    assert list(READER.read({"text": "a", "image": png})) == ["text", "image"], "the order of the keys is kept"
    assert equal(READER.read({"image": [png, shown]}), {"image": [shown, shown]})
    assert equal(READER.read(clip()), clip())
    assert equal(READER.read({"video": list(clip())}), {"video": clip()})
    assert equal(READER.read({"video": [clip(2), clip(4)]}), {"video": [clip(2), clip(4)]})
    assert equal(READER.read({"video": [png, str(png)]}), {"video": np.stack([np.asarray(shown)] * 2)})
    assert READER.read(sound())[0] == sound()[0]
    assert READER.read({"array": sound(), "sampling_rate": 16000})["sampling_rate"] == 16000
    assert READER.read({"text": str(png)}) == {"text": str(png)}, "a path under text is words"


def test_conversations(png):
    shown = picture(56, 28, 1)
    encoded = base64.b64encode(png.read_bytes()).decode()
    expected = user({"type": "text", "text": "a"}, {"type": "image", "image": shown})
    for key, value in {"image": shown, "path": str(png), "url": str(png), "base64": encoded}.items():
        part = {"type": "image", key: value}
        assert equal(READER.read(user({"type": "text", "text": "a"}, part)), expected)
    assert READER.read({"role": "user", "content": "a"}) == [{"role": "user", "content": "a"}]
    frames = READER.read(user({"type": "video", "video": list(clip())}))[0]["content"][0]["video"]
    assert equal(frames, clip())
    flat = InputReader(modalities=ALL, flat=True)
    assert flat.read(user({"type": "text", "text": "a"}, {"type": "text", "text": "b"})) == [
        {"role": "user", "content": "ab"}
    ]


BAD = {
    "none": (None, "got a missing value"),
    "NaN": (float("nan"), "got a missing value .nan"),
    "number": (3, "got int; text, an image, an array or a dict is needed"),
    "bytes": (b"abc", 'say what they are, as in {"image": ...}'),
    "half a character": ("\ud800", "lone surrogate. at 0"),
    "empty dict": ({}, "keys text, image, video, audio, got none"),
    "wrong key": ({"img": picture()}, r"got \['img'\]. Rename or drop them"),
    "no text": ({"text": None}, "text: text must be a string, got NoneType"),
    "no image": ({"image": None}, "image: the image is None. Leave it out"),
    "no images": ({"image": [], "text": "a"}, "image is an empty list. Leave the key out"),
    "second image": ({"image": [picture(), "gone.png"]}, "image 1: the file 'gone.png' does not exist"),
    "no frames": ({"video": []}, "video: the video has no frames"),
    "zero frames": (np.zeros((0, 28, 28, 3)), "at least one of each"),
    "nan image": (np.full((28, 28, 3), np.nan), "2352 NaN or infinite values"),
    "nan video": ({"video": np.full((1, 2, 2, 3), np.nan)}, "video: .*12 NaN"),
    "nan sound": (np.full(10, np.nan), "the audio holds 10 NaN"),
    "no sound": (np.zeros(0), "audio must be an array of"),
    "no rate": ({"array": sound(), "sampling_rate": 0}, "sampling_rate must be above 0, got 0"),
    "five axes": (np.zeros((1, 1, 1, 1, 1)), "is no input"),
    "missing path": ("gone.png", "looks like image file, but there is none.*embed the words"),
    "missing folder": ("my files/gone now.mp4", "looks like video file"),
    "missing Path": (Path("gone.png"), "'gone.png' does not exist"),
    "unknown Path": (Path("gone"), "does not tell image, video or audio"),
    "pdf": (Path("report.pdf"), r"Pass its pages: pdf_pages\(path\)"),
    "url": ("http://127.0.0.1:9/a.png", "URLs are not fetched. Download it, pass allow_urls=True"),
    "image url": ({"image": "https://127.0.0.1:9/a"}, "image: the URL .* is not fetched"),
    "video url": ({"video": "https://127.0.0.1:9/a"}, "video: the URL .* is not fetched"),
    "pair": (("a", "b"), "a tuple of 2 is no single input"),
    "list": (["a"], "a list of 1 is no single input"),
    "turn without content": ([{"role": "user", "content": "a"}, {"role": "user"}], "turn 1: must be a dict"),
    "turn with None": ([{"role": "user", "content": None}], "turn 0: text must be a string, got NoneType"),
    "role": ([{"role": 1, "content": "a"}], "with a string as role"),
    "part without type": (
        user({"text": "a"}),
        "turn 0: part 0 must have the type text, .*, got None",
    ),
    "unknown part": (user({"type": "picture", "picture": 1}), "got 'picture'"),
    "part without image": (
        user({"type": "image"}),
        r"part 0 must hold one image .*'image', got \['type'\]",
    ),
    "two images in a part": (user({"type": "image", "image": picture(), "url": "b"}), "must hold one image"),
    "missing part": (
        user({"type": "image", "path": "gone.png"}),
        "turn 0: part 0: the file 'gone.png' does not",
    ),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("reader", [READER, HEADERS], ids=["decoding", "headers only"])
def test_refusals_say_what_was_seen_and_what_to_do(reader, value, message):
    with pytest.raises(ValueError, match=message):
        reader.read(value)


@pytest.mark.parametrize(
    "value", [picture(), clip(), sound(), {"image": picture()}, user({"type": "image"}), Path("a.png")]
)
def test_a_text_model_takes_text(value):
    with pytest.raises(ValueError, match="this model takes text, not|has no chat template"):
        InputReader(modalities=("text",)).read(value)


def test_for_a_text_model_a_path_is_words(png):
    reader = InputReader(modalities=("text",))
    for value in (str(png), "gone.png", "http://127.0.0.1:9/a.png"):
        assert reader.read(value) == value


def test_headers_are_checked_without_decoding(png, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert HEADERS.read(png) is None and HEADERS.read({"image": str(png), "text": "a"}) == {"image": None, "text": "a"}
    urls = InputReader(modalities=ALL, decode=False, media=MediaOptions(allow_urls=True))
    assert urls.read({"image": "http://127.0.0.1:9/a.png"}) == {"image": None}, "nothing is fetched for a check"


@pytest.mark.parametrize("name", ["num_frames", "max_pixels"])
def test_limits_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        MediaOptions(**{name: 0})


def test_the_reader_knows_its_model(qwen, btok_model):
    assert set(reader_for(qwen).modalities) == {"text", "image", "video", "message"}
    assert not reader_for(qwen).placeholders and not reader_for(qwen).flat, "the chat template guards text"
    assert reader_for(btok_model("llama")).flat
    assert reader_for(qwen, MediaOptions(num_frames=3)).media.num_frames == 3


def test_placeholders_are_parted_for_models_without_the_guard():
    reader = InputReader(modalities=ALL, placeholders=("<image>",))
    assert reader.read("a <image> b < image") == "a < image> b < image"
