"""Images and stored video frames on disk: checked once, decoded only when a batch needs them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps, UnidentifiedImageError

from evaluation.dataset import NUM_FRAMES

PROMPT_COLUMN = "task_prompt"
"""Column with a row's own prompt (mteb would append a column `instruction` to the text)."""

FRAME_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

SMALLEST_SIDE, ENLARGED = 28, (56, 56)  # VLM2Vec 6e1e1d4, src/model/processor.py:331


class BrokenMediaError(ValueError):
    """An image or a frame folder that can't be used; the message says which and why."""


def _open(source: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def read_image(source: str | bytes) -> Image.Image:
    """An image as models see it.

    Args:
        source: Path of the image, or its encoded bytes.

    Returns:
        The picture, turned as its EXIF data say; see `as_rgb`.
    """
    with _open(source) as image:
        return as_rgb(ImageOps.exif_transpose(image))


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture in RGB and without a transparency key: processors paint the pixels of that colour white."""
    picture = picture.convert("RGB")
    picture.info.pop("transparency", None)
    return picture


def check_image(source: str | bytes) -> None:
    """Read an image to its end, without keeping it.

    Args:
        source: Path of the image, or its encoded bytes.

    Raises:
        BrokenMediaError: Missing, not an image, or cut off.
    """
    try:
        with _open(source) as image:
            image.draft("RGB", (64, 64))  # JPEG: reads the whole stream but decodes an eighth of the pixels
            image.load()
    except FileNotFoundError:
        raise BrokenMediaError(f"image {source!r} does not exist") from None
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        shown = f"{len(source)} bytes" if isinstance(source, bytes) else repr(source)
        raise BrokenMediaError(f"image ({shown}) can't be decoded: {error}") from error


def enlarged(source: str) -> str | bytes:
    """An image as the benchmark's harness shows it: one under 28 pixels, the size of a patch of Qwen2-VL, is enlarged.

    Args:
        source: Path of the image.

    Returns:
        The path, or, where width or height is under 28 pixels, a TIFF of the image resized to 56 x 56, as bytes (it
        isn't compressed, so the bytes are equal on every machine); the path too where the image can't be read, which
        `check_image` reports.
    """
    try:
        with _open(source) as image:
            if min(image.size) >= SMALLEST_SIDE:
                return source
            buffer = io.BytesIO()
            image.resize(ENLARGED).save(buffer, "TIFF")
            return buffer.getvalue()
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return source


def stored_frames(folder: Path) -> list[Path]:
    """The frames of one video in temporal order.

    Args:
        folder: Folder of image files; other files are ignored. Both `frame_0007.jpg` and `0007.jpeg` circulate, so
            the order is natural (digits by value) and no name pattern is relied on.

    Returns:
        Paths of the frames.

    Raises:
        BrokenMediaError: No such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BrokenMediaError(f"frame folder {str(folder)!r} does not exist")
    frames = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    if not frames:
        raise BrokenMediaError(f"frame folder {str(folder)!r} holds no image")
    return sorted(frames, key=lambda path: natural_key(path.name))


def choose_frames(frames: Sequence[Path], count: int = NUM_FRAMES) -> tuple[str, ...]:
    """Evenly spread frames of a stored video, as the official evaluator picks them.

    Args:
        frames: Stored frames in temporal order.
        count: How many to show; a video with fewer shows all of them.

    Returns:
        Paths at the positions `int(linspace(0, n - 1, count))`.
    """
    if len(frames) < count:
        return tuple(map(str, frames))
    return tuple(str(frames[int(position)]) for position in np.linspace(0, len(frames) - 1, count))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares runs of digits by value: frame_10 after frame_9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


@dataclass(frozen=True)
class StoredFrames:
    """A video stored as image files, with the part of torchcodec's `VideoDecoder` that mteb's collator reads.

    Args:
        paths: Frames in temporal order: paths, or encoded bytes.
    """

    paths: tuple[str | bytes, ...]

    @property
    def metadata(self) -> SimpleNamespace:
        """`num_frames`; there is no clock, so frames-per-second sampling is refused by mteb."""
        return SimpleNamespace(num_frames=len(self.paths), end_stream_seconds=None)

    def images(self) -> list[Image.Image]:
        """The frames as RGB pictures."""
        return [read_image(source) for source in self.paths]

    def as_video(self) -> dict[str, Any]:
        """The frames as sentence-transformers' video input, so that every one of them is shown.

        Without a frame rate, Qwen3-VL's processor takes 24 frames a second and keeps two of each second: 4 of 8 chosen
        frames. One a second keeps all. A single frame is shown twice, because that processor refuses one.
        """
        frames = self.images()
        frames = frames if len(frames) > 1 else frames * 2
        metadata = {"total_num_frames": len(frames), "fps": 1.0, "frames_indices": list(range(len(frames)))}
        return {"array": frames, "video_metadata": metadata}

    def get_frames_at(self, indices: Sequence[int]) -> SimpleNamespace:
        """The chosen frames as `data`, uint8 (frames, 3, height, width); all of them take the first one's size."""
        pictures = [read_image(self.paths[index]) for index in indices]
        size = pictures[0].size
        arrays = [np.asarray(p if p.size == size else p.resize(size)) for p in pictures]
        return SimpleNamespace(data=torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous())


def decode_videos(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Transform of a `Dataset` whose `video` column holds lists of frame paths: each becomes a `StoredFrames`."""
    if "video" in batch:
        batch["video"] = [None if paths is None else StoredFrames(tuple(paths)) for paths in batch["video"]]
    return batch


def with_videos(dataset: Dataset) -> Dataset:
    """The same data set, its `video` column (lists of frame paths) decoded on access."""
    return dataset.with_transform(decode_videos) if "video" in dataset.column_names else dataset
