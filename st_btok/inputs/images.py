"""Images as the checked path reads them: any source, any mode, to upright 8-bit RGB of a bounded size.

The rules, in order. What a plain `encode` does with the same image was measured and differs where marked (*).

* A file is opened by its header first; more than `LARGEST_IMAGE` pixels are refused before anything is decoded (*).
* EXIF orientation is applied (* for PIL images), and of an animated image the first frame is taken (* an error).
* Transparency is laid over white (* PIL images lose it, so hidden colours show).
* 16-bit and 32-bit grey values are scaled to 8 bits (* PIL images are clipped to white); floats within 0..1 count as
  fractions of full brightness (* turn black), other numbers must lie within 0..255; NaN is refused (* NaN embeddings).
* A side shorter than 1/100 of the other is padded with white to that ratio (* several processors raise).
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

# Pixels. Pillow's own limit for refusing a file as a decompression bomb, held also where a program has lifted it.
LARGEST_IMAGE = 178_956_970
LONGEST_RATIO = 100  # Qwen's processors raise above 200
_BACKGROUND = (255, 255, 255)
_FETCH_SECONDS, _FETCH_BYTES = 30, 2**28


def is_url(source: Any) -> bool:
    """Whether a source would have to be fetched from the network.

    Args:
        source: Anything.

    Returns:
        True for text that starts with `http://` or `https://`.
    """
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def read_source(source: Any, allow_urls: bool = False) -> Any:
    """Turn a path, URL or data URI into something that opens as a file; everything else is returned as it is.

    Args:
        source: Path, URL, data URI or bytes.
        allow_urls: Fetch URLs (30 s, at most 256 MiB).

    Returns:
        A path that exists, a binary stream, or the source itself.

    Raises:
        ValueError: If there is no such file, or a URL may not be fetched or can't be.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if is_url(source):
        if not allow_urls:
            raise ValueError(f"the URL {source!r} is not fetched. Download it first, or pass allow_urls=True")
        try:
            with urllib.request.urlopen(source, timeout=_FETCH_SECONDS) as answer:
                data = answer.read(_FETCH_BYTES + 1)
        except OSError as error:
            raise ValueError(f"the URL {source!r} can't be fetched: {error}. Download it first") from error
        if len(data) > _FETCH_BYTES:
            raise ValueError(f"the URL {source!r} holds more than {_FETCH_BYTES} bytes. Download it first")
        return io.BytesIO(data)
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"the data URI {source[:40]!r}... is not base64. Pass a path or bytes") from error
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise ValueError(f"the file {str(source)[:200]!r} {kind}. Check the path")
        return path
    return source


def open_image(source: Any, allow_urls: bool = False) -> Image.Image:
    """Open an image and check its header; pixels are not decoded yet.

    Args:
        source: Path, URL, data URI, bytes or PIL image.
        allow_urls: Fetch URLs.

    Returns:
        A PIL image of at least 1 and at most `LARGEST_IMAGE` pixels.

    Raises:
        ValueError: If it is not an image, empty, or too large.
    """
    image = source
    if not isinstance(source, Image.Image):
        opened = read_source(source, allow_urls)
        try:
            image = Image.open(opened)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source_name(source)} is too large: {error} Shrink it first") from error
        except Exception as error:  # what damage raises differs by format: OSError, SyntaxError, RuntimeError, ...
            raise ValueError(
                f"{source_name(source)} is not an image that Pillow can open: {error}. Convert it to PNG"
            ) from error
    if image.format == "EPS":  # loading one starts Ghostscript, a program of its own
        raise ValueError(f"{source_name(source)} is PostScript. Convert it to PNG")
    if not image.width * image.height:
        raise ValueError(f"{source_name(source)} has no pixels ({image.width} x {image.height}). Leave it out")
    if image.width * image.height > LARGEST_IMAGE:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"{source_name(source)} has {size} pixels, more than {LARGEST_IMAGE}. Shrink it first")
    return image


def rgb_image(source: Any, max_pixels: int | None = None, allow_urls: bool = False) -> Image.Image:
    """Read an image to upright 8-bit RGB by the rules of this module.

    Args:
        source: Path, URL, data URI, bytes, PIL image, numpy array or torch tensor of (H, W), (H, W, C) or (C, H, W)
            with C of 1, 3 or 4. Where both readings fit, the channels are last in an array and first in a tensor.
        max_pixels: Larger images are shrunk to this area, keeping their shape. Default: no shrinking; the model's own
            processor does that.
        allow_urls: Fetch URLs.

    Returns:
        A decoded RGB image.

    Raises:
        ValueError: If the image can't be read, is truncated, too large, or holds values that are no brightness.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return shrink(_pad(_opaque(_from_array(source))), max_pixels)
    opened = open_image(source, allow_urls)
    place = opened.tell()
    try:
        if place:
            opened.seek(0)
        image = _opaque(ImageOps.exif_transpose(opened))
        if place:
            opened.seek(place)  # the caller's image is left as it was
    except Exception as error:
        raise ValueError(f"{source_name(source)} can't be decoded: {error}. Make the file again") from error
    finally:
        if opened is not source:
            opened.close()
    return shrink(_pad(image), max_pixels)


def shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Shrink an image to an area, keeping its shape.

    Args:
        image: Any image.
        max_pixels: Largest area, at least 1; None leaves the image as it is.

    Returns:
        The image, or a smaller copy.

    Raises:
        ValueError: If `max_pixels` is smaller than 1.
    """
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def source_name(source: Any) -> str:
    """How an error calls a source.

    Args:
        source: Anything.

    Returns:
        The path or URL, or the type.
    """
    if isinstance(source, str | Path):
        return f"the file {str(source)[:200]!r}"
    return f"the {type(source).__name__}"


def to_bytes(values: Any, what: str) -> np.ndarray:
    """Brightness values as uint8.

    Args:
        values: Array or tensor of booleans, integers or floats.
        what: How an error calls it.

    Returns:
        An array of the same shape, uint8.

    Raises:
        ValueError: If a value is NaN, infinite or outside its range.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    values = np.asarray(values)
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "uif":
        raise ValueError(f"{what} must hold numbers, got dtype {values.dtype}. Pass uint8")
    bad = ~np.isfinite(values)
    if bad.any():
        where = tuple(int(axis) for axis in np.argwhere(bad)[0])
        raise ValueError(f"{what} holds {int(bad.sum())} NaN or infinite values, the first at {where}. Repair it")
    low, high = float(values.min()), float(values.max())
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if low < 0 or high > 255:
        raise ValueError(
            f"{what} must hold values within 0..255 (or fractions within 0..1), got {low:g}..{high:g}. It may be "
            "normalised already: pass the pixels before that"
        )
    if values.dtype.kind == "f" and high <= 1:
        values = values * 255
    return np.round(values).astype(np.uint8)


def _from_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    shape = tuple(source.shape)
    what = f"the {type(source).__name__} of shape {shape}"
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{what} is no image. Pass (H, W), (H, W, C) or (C, H, W) with sides of at least 1")
    pixels = math.prod(shape) // (min(shape) if len(shape) == 3 else 1)
    if pixels > LARGEST_IMAGE:
        raise ValueError(f"{what} has more than {LARGEST_IMAGE} pixels. Shrink it first")
    values = to_bytes(source, what)
    if values.ndim == 3:
        values = channels_last(values, isinstance(source, torch.Tensor), what)
        values = values[..., 0] if values.shape[-1] == 1 else values
    return Image.fromarray(np.ascontiguousarray(values))


def channels_last(values: np.ndarray, first_wins: bool, what: str) -> np.ndarray:
    """Move the channels of (..., H, W, C) or (..., C, H, W) values to the end.

    Args:
        values: An array.
        first_wins: Which reading holds where both fit.
        what: How an error calls it.

    Returns:
        (..., H, W, C) with C of 1, 3 or 4.

    Raises:
        ValueError: If neither place holds 1, 3 or 4 channels.
    """
    first, last = values.shape[-3] in (1, 3, 4), values.shape[-1] in (1, 3, 4)
    if not first and not last:
        raise ValueError(f"{what} must have 1, 3 or 4 channels, first or last. Drop the others")
    return np.moveaxis(values, -3, -1) if first and (first_wins or not last) else values


def _opaque(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
        values = values.astype(np.uint16) if image.mode == "I" and 255 < values.max() < 2**16 else values
        image = Image.fromarray(to_bytes(values, f"the image of mode {image.mode}"))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, _BACKGROUND)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image.load()
    return image.convert("RGB")


def _pad(image: Image.Image) -> Image.Image:
    """Widen a side that is too short for the other one, by white on both sides."""
    least = -(-max(image.size) // LONGEST_RATIO)
    if min(image.size) >= least:
        return image
    size = (max(image.width, least), max(image.height, least))
    ground = Image.new("RGB", size, _BACKGROUND)
    ground.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return ground
