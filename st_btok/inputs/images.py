"""Images to upright 8-bit RGB: identify -> open -> bound -> decode -> normalise.

The pixels are those that plain `SentenceTransformer.encode` makes of the same file, because queries come through it;
measured over Pillow's formats (transformers 5.23, torchvision 0.29): equal wherever `encode` reads a file. Where it
does not, or not soundly, this module differs:

* identify, open: by content, from a list of formats; PostScript is refused, as loading it starts another program.
  `encode` fails on BMP, TIFF and animations, and ends the process on some corrupt PNGs.
* bound: more than `LARGEST_IMAGE` pixels are refused by the header; `encode` decodes them. Images of more than
  `LARGE_IMAGE` pixels are decoded one at a time and shrunk by a whole factor at once, strip by strip: whole, each
  would be held several times over, and 4 bytes a value in the processor.
* decode: truncated files are errors that name the file. Of an animation the first frame is taken. Where a GIF is
  transparent, its own hidden colour shows; `encode` shows another.
* normalise: EXIF orientation is applied (`encode` forgets it for WebP, and for PIL images); transparency is dropped as
  in `encode`, unless a `background` is asked for; 16-bit grey is scaled (`encode` clips it to white); NaN is refused.
  A side shorter than 1/200 of the other is padded to that ratio (`encode` raises for the Qwen family).
"""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps

from st_btok.inputs.fetch import read_source, source_name
from st_btok.inputs.pixels import LARGEST_DEEP_IMAGE, LARGEST_IMAGE, eight_bits, image_of_array, is_deep

# What is opened. Not on the list: formats whose plugins start programs (EPS), open what they hold as a file of any
# other format (IPTC, MIC, FPX), or only announce what other software would have to read (GRIB, HDF5, BUFR, WMF).
_FORMATS = (
    "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "ICNS", "CUR", "DIB", "PPM", "TGA", "PCX",
    "SGI", "QOI", "DDS", "PSD", "IM", "MSP", "XBM", "XPM", "SUN", "BLP", "FITS", "SPIDER", "PIXAR", "DCX",
)  # fmt: skip
LARGE_IMAGE = 2**24  # pixels; more than most cameras make, and 16 times what a model of this package takes by default
LONGEST_RATIO = 200  # the Qwen processors raise beyond
_PADDED_PIXELS = 2**22  # of a thin image that has to be padded; a longer one is shrunk first
_STRIP = 256  # rows that are laid over a background, or shrunk, at a time
_ONE_LARGE_IMAGE = threading.Lock()  # the threads that read ahead would hold several at once
# How each value of EXIF's orientation is turned upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def formats() -> tuple[str, ...]:
    """The formats that are opened, of those that this Pillow can read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(source: Any, allow_urls: bool = False) -> Image.Image:
    """Open an image and check its header; pixels are not decoded yet.

    Args:
        source: Path, URL, data URI, base64, bytes or PIL image.
        allow_urls: Fetch URLs.

    Returns:
        A PIL image of at least 1 and at most `LARGEST_IMAGE` pixels.

    Raises:
        ValueError: If it is not an image, empty, or too large.
    """
    image = source
    if not isinstance(source, Image.Image):
        image = _open(source, read_source(source, allow_urls))
    if image.format == "EPS":  # a caller's own; loading one starts Ghostscript, a program of its own
        raise ValueError(f"{source_name(source)} is PostScript. Convert it to PNG")
    if not image.width * image.height:
        raise ValueError(f"{source_name(source)} has no pixels ({image.width} x {image.height}). Leave it out")
    largest = LARGEST_DEEP_IMAGE if is_deep(image) else LARGEST_IMAGE
    if image.width * image.height > largest:
        size = f"{image.width} x {image.height}"
        raise ValueError(
            f"{source_name(source)} has {size} pixels of mode {image.mode}, more than {largest}. Shrink it first"
        )
    return image


def _open(source: Any, opened: Any) -> Image.Image:
    try:
        return Image.open(opened, formats=formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"{source_name(source)} is too large: {error} Shrink it first") from error
    except Exception as error:  # what damage raises differs by format: OSError, SyntaxError, RuntimeError, ...
        if is_postscript(opened):
            raise ValueError(f"{source_name(source)} is PostScript. Convert it to PNG") from error
        raise ValueError(
            f"{source_name(source)} is not an image that can be opened: {error}. Convert it to PNG"
        ) from error


def is_postscript(opened: Any) -> bool:
    """Whether a file or stream starts as PostScript does, or as the binary form that wraps it.

    Args:
        opened: A path or a binary stream; its position is moved.

    Returns:
        True for PostScript.
    """
    if isinstance(opened, Path):
        with opened.open("rb") as stream:
            start = stream.read(4)
    elif hasattr(opened, "seek"):
        opened.seek(0)
        start = opened.read(4)
    else:
        return False
    return start in (b"%!PS", b"\xc5\xd0\xd3\xc6")


def rgb_image(
    source: Any, max_pixels: int | None = None, allow_urls: bool = False, background: str | None = None
) -> Image.Image:
    """Read an image to upright 8-bit RGB by the rules of this module.

    Args:
        source: Path, URL, data URI, base64, bytes, PIL image, numpy array or torch tensor of (H, W), (H, W, C) or
            (C, H, W) with C of 1, 3 or 4. Where both readings fit, the channels are last in an array and first in a
            tensor.
        max_pixels: Larger images are shrunk to this area, keeping their shape. Default: no shrinking; the model's own
            processor does that.
        allow_urls: Fetch URLs.
        background: Colour under transparent images, such as `"white"`. Default: transparency is dropped.

    Returns:
        A decoded RGB image.

    Raises:
        ValueError: If the image can't be read, is truncated, too large, or holds values that are no brightness.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        image = normalise(image_of_array(source), background)
    else:
        image = _decoded(source, open_image(source, allow_urls), background)
    return shrink(_pad(image), max_pixels)


def _decoded(source: Any, opened: Image.Image, background: str | None) -> Image.Image:
    """The pixels of an opened image, its first frame."""
    factor = _factor(opened)
    with _ONE_LARGE_IMAGE if factor > 1 else nullcontext():
        place = opened.tell()
        try:
            if place:
                opened.seek(0)
            if factor > 1 and opened is not source:
                opened.draft(None, (opened.width // factor, opened.height // factor))  # JPEG: decoded smaller
            opened.load()
            image = normalise(opened, background)
            if place:
                opened.seek(place)  # the caller's image is left as it was
        except (MemoryError, ImportError):
            raise
        except Exception as error:
            raise ValueError(f"{source_name(source)} can't be decoded: {error}. Make the file again") from error
        finally:
            if opened is not source:
                opened.close()
        return image


def normalise(image: Image.Image, background: str | None = None) -> Image.Image:
    """A decoded image of any mode as upright RGB.

    Args:
        image: A decoded image; it is left as it is.
        background: See `rgb_image`.

    Returns:
        An RGB image, of at most `LARGE_IMAGE` pixels.
    """
    if (factor := _factor(image)) > 1:
        return _shrunk_by_strips(image, factor, background)
    image = eight_bits(ImageOps.exif_transpose(image))
    if background is None or not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):  # whole, this would hold the image three times more
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        ground.paste(_without_transparency(strip, background), (0, top))
    return ground


def _without_transparency(strip: Image.Image, background: str) -> Image.Image:
    strip = strip.convert("RGBA")
    under = Image.new("RGBA", strip.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(under, strip).convert("RGB")


def _factor(image: Image.Image) -> int:
    """By what the sides of an image are divided to leave `LARGE_IMAGE` pixels, rounded up; 1 for nearly all images."""
    return math.ceil((image.width * image.height / LARGE_IMAGE) ** 0.5)


def _shrunk_by_strips(image: Image.Image, factor: int, background: str | None) -> Image.Image:
    """A large image as a small upright RGB one, with little memory beside its own pixels."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    lies_over = background if image.has_transparency_data else None
    image = eight_bits(image)
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, _STRIP * factor):
        strip = image.crop((0, top, image.width, min(top + _STRIP * factor, image.height)))
        strip = strip.convert("RGB") if lies_over is None else _without_transparency(strip, lies_over)
        small.paste(strip.reduce(factor), (0, top // factor))
    turn = _UPRIGHT.get(orientation or 1)
    return small if turn is None else small.transpose(turn)


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


def _pad(image: Image.Image) -> Image.Image:
    """Widen a side that is too short for the other one, by white on both sides."""
    longest = int((_PADDED_PIXELS * LONGEST_RATIO) ** 0.5)
    if min(image.size) * LONGEST_RATIO >= max(image.size):
        return image
    if max(image.size) > longest:  # 467 bytes of PNG can announce 1 x 200,000 pixels, padded 200 Mpx
        size = (min(image.width, longest), min(image.height, longest))
        image = image.resize(size, Image.Resampling.BICUBIC)
    least = -(-max(image.size) // LONGEST_RATIO)
    size = (max(image.width, least), max(image.height, least))
    ground = Image.new("RGB", size, "white")
    ground.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return ground
