"""When two inputs are one: before they are read, by what the user gave; once media are decoded, by their values."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def identity(value: Any) -> Any:
    """Equal for inputs that are certainly the same: equal texts, paths and bytes, and objects that are one object.

    Args:
        value: An input as the user gave it.

    Returns:
        Something hashable.
    """
    if isinstance(value, str | bytes | Path):
        return type(value), value
    if isinstance(value, dict):  # in the user's order: media before and behind a text are different inputs
        return dict, tuple((str(key), identity(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(identity(item) for item in value)
    return _Object(value)


def content_of(value: Any) -> Any:
    """Equal for inputs that look the same: media count by their values, whatever object or file they came from.

    Args:
        value: A normalised input.

    Returns:
        Something hashable.
    """
    if isinstance(value, Image.Image):
        return Image.Image, value.mode, value.size, _digest(value.tobytes())
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, np.ndarray):
        return np.ndarray, value.dtype.str, value.shape, _digest(np.ascontiguousarray(value).data)
    if isinstance(value, dict):
        return dict, tuple((str(key), content_of(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return list, tuple(map(content_of, value))
    return identity(value)


def _digest(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


class _Object:
    """Equal to itself only; holds the object, so that its place in memory is given to no other."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value
