"""Arrays and unusual image modes to 8-bit brightness values, channels last."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

# Pixels. Pillow's own limit for refusing a file as a decompression bomb, held also where a program has lifted it.
LARGEST_IMAGE = 178_956_970
LARGEST_DEEP_IMAGE = 2**25  # of 16 or 32 bits a value, which take several copies to bring to 8


def to_bytes(values: Any, what: str) -> np.ndarray:
    """Brightness values as uint8.

    Args:
        values: Array or tensor of booleans, integers or floats. Numbers within 0..255 are taken as they are, whatever
            their type; 16-bit values beyond that lose their lower byte; floats within 0..1 are fractions.
        what: How an error calls it.

    Returns:
        An array of the same shape, uint8.

    Raises:
        ValueError: If a value is NaN, infinite or outside its range.
    """
    values = _array(values, what)
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "uif":
        raise ValueError(f"{what} must hold numbers, got dtype {values.dtype}. Pass uint8")
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
        if bad.any():
            where = tuple(int(axis) for axis in np.argwhere(bad)[0])
            raise ValueError(f"{what} holds {int(bad.sum())} NaN or infinite values, the first at {where}. Repair it")
    low, high = float(values.min()), float(values.max())
    if values.dtype == np.uint16 and high > 255:
        return (values >> 8).astype(np.uint8)
    if low < 0 or high > 255:
        raise ValueError(
            f"{what} must hold values within 0..255 (or fractions within 0..1), got {low:g}..{high:g}. It may be "
            "normalised already: pass the pixels before that"
        )
    if values.dtype.kind == "f" and high <= 1:
        values = values * 255
    return np.round(values).astype(np.uint8)


def _array(values: Any, what: str) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        kind = "meta" if values.is_meta else "quantised" if values.is_quantized else str(values.layout)
        raise ValueError(f"{what} must hold its values one by one, got a tensor that is {kind}. Pass a dense one")
    values = values.detach().cpu()
    return values.float().numpy() if values.is_floating_point() else values.numpy()


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


def image_of_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    """An array as an image of mode L, RGB or RGBA.

    Args:
        source: (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4.

    Returns:
        The image.

    Raises:
        ValueError: If it has another shape, too many pixels, or values that are no brightness.
    """
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


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of 16 or 32 bits.

    Args:
        image: Any image.

    Returns:
        True for the modes that `eight_bits` changes.
    """
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of one channel of 16 or 32 bits as grey of 8 bits; any other image as it is.

    Args:
        image: A decoded image.

    Returns:
        An image whose values fit 8 bits.

    Raises:
        ValueError: If a value is NaN, infinite or outside its range.
    """
    what = f"the image of mode {image.mode}"
    if image.mode.startswith("I;16"):
        return Image.fromarray(to_bytes(np.asarray(image).astype(np.uint16), what))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        is_16_bit = image.mode == "I" and 0 <= values.min() and values.max() < 2**16
        return Image.fromarray(to_bytes(values.astype(np.uint16) if is_16_bit else values, what))
    return image
