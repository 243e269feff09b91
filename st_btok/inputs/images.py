"""Images to upright 8-bit RGB: identify -> open -> bound -> decode -> normalise.

The pixels equal those of plain `SentenceTransformer.encode` wherever that reads a file, because queries go through it
(measured over Pillow's formats; transformers 5.23, torchvision 0.29). Where `encode` does not read a file, or reads it
wrongly, this module differs:

* identify, open: by content, from a list of formats; PostScript is refused, as loading it starts another program.
  `encode` fails on BMP, TIFF and animations, and ends the process on some corrupt PNGs. HEIC needs `pillow-heif`.
* bound: more than `LARGEST_IMAGE` pixels are refused by the header; `encode` decodes them. Images of more than
  `LARGE_IMAGE` pixels are decoded one at a time and shrunk at once, strip by strip and by a whole factor. Else each
  would be in memory several times, with 4 bytes a value in the processor.
* decode: truncated files are errors that name the file; broken metadata are no error, as in `encode`. An animation
  gives its first frame, a file of layers all of them together. A transparent GIF shows its own hidden colour; `encode`
  shows another.
* normalise: EXIF orientation is applied (`encode` forgets it for WebP, and for PIL images). Transparency is dropped as
  in `encode`, unless a `background` is asked for, and with it the key that lets processors paint a colour white. Grey
  of 16 bits is scaled (`encode` clips it to white); NaN is refused. A side shorter than 1/200 of the other is padded
  to that ratio (`encode` raises for the Qwen family).
"""

from __future__ import annotations

import io
import math
import threading
import zlib
from contextlib import nullcontext
from functools import cache
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from st_btok.inputs.fetch import MediaOptions, Opened, open_source

# The formats that are opened. Left out are formats whose plugins start programs (EPS), open their content as a file of
# any other format (IPTC, MIC, FPX), or need other software to read it (GRIB, HDF5, BUFR, WMF).
_FORMATS = (
    "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "ICNS", "CUR", "DIB", "PPM", "TGA", "PCX",
    "SGI", "QOI", "DDS", "PSD", "IM", "MSP", "XBM", "XPM", "SUN", "BLP", "FITS", "SPIDER", "PIXAR", "DCX",
)  # fmt: skip
# In pixels. Pillow's own limit, above which it refuses a file as a decompression bomb; kept where a program lifted it.
LARGEST_IMAGE = 178_956_970
LARGEST_DEEP_IMAGE = 2**25  # for 16 or 32 bits a value, whose conversion to 8 bits takes several copies
LARGE_IMAGE = 2**24  # pixels; more than most cameras make, and 16 times what a model of this package takes by default
LONGEST_RATIO = 200  # the Qwen processors raise beyond
_PADDED_PIXELS = 2**22  # largest area of a thin image after padding; a longer one is shrunk before
_STRIP = 256  # rows that are laid over a background, or shrunk, at a time
_ONE_LARGE_IMAGE = threading.Lock()  # else the threads that read ahead would hold several
# Loading changes an image object, and the caller may have put one object into many rows, which several threads read.
_ONE_READER_EACH = [threading.Lock() for _ in range(64)]
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PNG = b"\x89PNG\r\n\x1a\n"


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
    return image_header(open_source(source, allow_urls))


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
    media = MediaOptions(allow_urls, None, max_pixels, background)
    with open_source(source, allow_urls) as opened:
        return decode_image(opened, media)


def decode_image(opened: Opened, media: MediaOptions) -> Image.Image:
    """The RGB pixels of an opened file, PIL image, array or tensor; errors as those of `rgb_image`."""
    value = opened.value
    if isinstance(value, np.ndarray | torch.Tensor):
        image = normalise(_image_of_array(value), media.background)
    elif opened.file is None:
        with _ONE_READER_EACH[id(value) // 16 % len(_ONE_READER_EACH)]:
            image = _decoded(opened, media.background)
    else:
        try:
            image = _decoded(opened, media.background)
        except ValueError:
            bare = _without_metadata(opened.file)
            if bare is None:
                raise
            image = _decoded(Opened(opened.name, bare), media.background)
    return shrink(_pad(image), media.max_pixels)


def check_image(opened: Opened) -> None:
    """Find what is wrong with an image without decoding it: its header or array, and its size."""
    if isinstance(opened.value, np.ndarray | torch.Tensor):
        check_brightness(opened.value, _check_array(opened.value))
    else:
        image_header(opened)


def image_header(opened: Opened) -> Image.Image:
    """An undecoded PIL image, which reads from the open file; a `ValueError` if it is no image, empty or too large."""
    image = opened.value if opened.file is None else _identified(opened, opened.file)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{opened.name} is not an image. Pass a path, bytes, an array or a PIL image")
    if image.format == "EPS":  # a caller's own; loading one starts Ghostscript, a program of its own
        raise ValueError(f"{opened.name} is PostScript. Convert it to PNG")
    if not image.width * image.height:
        raise ValueError(f"{opened.name} has no pixels ({image.width} x {image.height}). Leave it out")
    largest = LARGEST_DEEP_IMAGE if _is_deep(image) else LARGEST_IMAGE
    if image.width * image.height > largest:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"{opened.name} has {size} pixels of mode {image.mode}, more than {largest}. Shrink it first")
    return image


def _identified(opened: Opened, file: IO[bytes]) -> Image.Image:
    start = file.read(12)
    file.seek(0)
    if is_postscript(start):
        raise ValueError(f"{opened.name} is PostScript. Convert it to PNG")
    try:
        return Image.open(file, formats=formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"{opened.name} is too large: {error} Shrink it first") from error
    except Exception as error:  # what damage raises differs by format: OSError, SyntaxError, RuntimeError, ...
        if (bare := _without_metadata(file)) is not None:
            return _identified(opened, bare)
        if start[4:8] == b"ftyp" and start[8:] in _HEIF_BRANDS:
            return _identified_heif(opened, file)
        why = "its content is of no known kind" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{opened.name} is not an image that can be opened: {why}. Convert it to PNG") from error


def _identified_heif(opened: Opened, file: IO[bytes]) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError(
            f"{opened.name} is HEIC, which pillow-heif reads: `pip install pillow-heif`, or convert it to PNG"
        ) from error
    pillow_heif.register_heif_opener()
    file.seek(0)
    try:
        return Image.open(file, formats=("HEIF",))
    except Exception as error:
        raise ValueError(f"{opened.name} is HEIC that can't be opened. Make the file again") from error


def _without_metadata(file: IO[bytes]) -> IO[bytes] | None:
    """A PNG with only what its pixels need, as Pillow fails on broken metadata; None if it held nothing else."""
    file.seek(0)
    data = file.read() if file.read(len(_PNG)) == _PNG else b""
    file.seek(0)
    kept, place = [_PNG], 0
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        kind, chunk = data[place + 4 : place + 8], data[place:end]
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind in (b"tRNS", b"eXIf") and is_whole):
            kept.append(chunk)
        place = end
    bare = b"".join(kept)
    return io.BytesIO(bare) if len(_PNG) < len(bare) < len(_PNG) + len(data) else None


def is_postscript(start: bytes) -> bool:
    """Whether a file's first bytes are those of PostScript, or of the binary form around it."""
    return start[:4] in (b"%!PS", b"\xc5\xd0\xd3\xc6")


def _decoded(opened: Opened, background: str | None) -> Image.Image:
    """The pixels of an opened image, its first frame."""
    image = image_header(opened)
    factor = _factor(image)
    with _ONE_LARGE_IMAGE if factor > 1 else nullcontext():
        place = 0 if image.format == "PSD" else image.tell()  # the layers of a PSD are counted from 1; 0 is the whole
        try:
            if place:
                image.seek(0)
            if factor > 1 and opened.file is not None:
                image.draft(None, (image.width // factor, image.height // factor))  # JPEG: decoded smaller
            image.load()
            pixels = normalise(image, background)
            if place:
                image.seek(place)  # the caller's image is left as it was
        except (MemoryError, ImportError):
            raise
        except Exception as error:
            raise ValueError(f"{opened.name} can't be decoded: {error}. Make the file again") from error
        return pixels


def normalise(image: Image.Image, background: str | None = None) -> Image.Image:
    """A decoded image of any mode as upright RGB of at most `LARGE_IMAGE` pixels, without metadata.

    The given image is left as it is. `background` as for `rgb_image`.
    """
    orientation, lies_over = _orientation(image), background if image.has_transparency_data else None
    factor = _factor(image)
    image = _eight_bits(image)
    if factor == 1 and lies_over is None:
        pixels = image.convert("RGB")
        pixels.info.clear()  # a transparency key left there lets processors paint that colour white
    else:  # strip by strip, or the whole image would be in memory three times more
        pixels = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
        for top in range(0, image.height, _STRIP * factor):
            strip = image.crop((0, top, image.width, min(top + _STRIP * factor, image.height)))
            strip = strip.convert("RGB") if lies_over is None else _without_transparency(strip, lies_over)
            pixels.paste(strip.reduce(factor), (0, top // factor))
    if orientation != 1:
        pixels.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(pixels, in_place=True)
    return pixels


def _orientation(image: Image.Image) -> int:
    """What EXIF says of it; 1 is upright."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata, which differ in what they raise
        return 1


def _without_transparency(strip: Image.Image, background: str) -> Image.Image:
    strip = strip.convert("RGBA")
    under = Image.new("RGBA", strip.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(under, strip).convert("RGB")


def _factor(image: Image.Image) -> int:
    """The whole number that divides both sides so that at most `LARGE_IMAGE` pixels are left; 1 for most images."""
    return math.ceil((image.width * image.height / LARGE_IMAGE) ** 0.5)


def shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Shrink an image to an area of at most `max_pixels`, keeping its shape; None leaves it as it is."""
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


def to_bytes(values: Any, what: str) -> np.ndarray:
    """Brightness values (booleans, integers, floats) as uint8; the given memory itself if it is that already.

    Numbers within 0..255 are taken as they are, whatever their type; 16-bit values beyond that lose their lower byte;
    floats within 0..1 are fractions. A `ValueError`, which calls them `what`, if one is NaN, infinite or outside its
    range.
    """
    values, high = check_brightness(values, what)
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16 and high > 255:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind == "f" and high <= 1:
        values = values * 255
    return np.round(values).astype(np.uint8)


def check_brightness(values: Any, what: str) -> tuple[np.ndarray, float]:
    """Check that an array or tensor holds values that `to_bytes` takes; returns them, and the largest."""
    values = _array(values, what)
    if values.dtype in (np.uint8, bool) or not values.size:
        return values, 255.0
    if values.dtype.kind not in "uif":
        raise ValueError(f"{what} must hold numbers, got dtype {values.dtype}. Pass uint8")
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
        if bad.any():
            where = tuple(int(axis) for axis in np.argwhere(bad)[0])
            raise ValueError(f"{what} holds {int(bad.sum())} NaN or infinite values, the first at {where}. Repair it")
    low, high = float(values.min()), float(values.max())
    if low < 0 or (high > 255 and values.dtype != np.uint16):
        raise ValueError(
            f"{what} must hold values within 0..255 (or fractions within 0..1), got {low:g}..{high:g}. It may be "
            "normalised already: pass the pixels before that"
        )
    return values, high


def _array(values: Any, what: str) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        kind = "meta" if values.is_meta else "quantised" if values.is_quantized else str(values.layout)
        raise ValueError(f"{what} must hold its values one by one, got a tensor that is {kind}. Pass a dense one")
    values = values.detach().cpu()
    return values.float().numpy() if values.is_floating_point() else values.numpy()


def channels_last(values: np.ndarray, first_wins: bool, what: str) -> np.ndarray:
    """(..., H, W, C) of that or (..., C, H, W) with C of 1, 3 or 4; `first_wins` says which holds if both fit."""
    first, last = values.shape[-3] in (1, 3, 4), values.shape[-1] in (1, 3, 4)
    if not first and not last:
        raise ValueError(f"{what} must have 1, 3 or 4 channels, first or last. Drop the others")
    return np.moveaxis(values, -3, -1) if first and (first_wins or not last) else values


def _check_array(source: np.ndarray | torch.Tensor) -> str:
    """Check an array that stands for an image; its name in errors comes back."""
    shape = tuple(source.shape)
    what = f"the {type(source).__name__} of shape {shape}"
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{what} is no image. Pass (H, W), (H, W, C) or (C, H, W) with sides of at least 1")
    pixels = math.prod(shape) // (min(shape) if len(shape) == 3 else 1)
    if pixels > LARGEST_IMAGE:
        raise ValueError(f"{what} has more than {LARGEST_IMAGE} pixels. Shrink it first")
    if len(shape) == 3 and not {shape[0], shape[-1]} & {1, 3, 4}:
        raise ValueError(f"{what} must have 1, 3 or 4 channels, first or last. Drop the others")
    return what


def _image_of_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    """An array as an image of mode L, RGB or RGBA."""
    what = _check_array(source)
    values = to_bytes(source, what)
    if values.ndim == 3:
        values = channels_last(values, isinstance(source, torch.Tensor), what)
        values = values[..., 0] if values.shape[-1] == 1 else values
    return Image.fromarray(np.ascontiguousarray(values))


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of 16 or 32 bits, which `_eight_bits` changes."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of one channel of 16 or 32 bits as grey of 8 bits; any other image as it is."""
    if not _is_deep(image):
        return image
    what, values = f"the image of mode {image.mode}", np.asarray(image)
    if image.mode != "F" and 0 <= values.min() and values.max() < 2**16:
        values = values.astype(np.uint16)
    return Image.fromarray(to_bytes(values, what))
