"""What is given to `st-btok` on the command line, looked at before anything heavy is imported.

Each function is a `type` of argparse: it takes the word, and returns it or raises `ArgumentTypeError` with the rule,
what was seen, and the nearest right word or the next action.
"""

from __future__ import annotations

import json
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Any one of these makes a folder a checkpoint, or the checkpoint of an adapter.
_CHECKPOINT = ("config.json", "modules.json", "adapter_config.json", "*.gguf")


def model(word: str) -> str:
    """A folder with a checkpoint, or what may be a name on the hub."""
    path = Path(word)
    if path.is_dir():
        if any(next(path.glob(name), None) for name in _CHECKPOINT):
            return word
        inside = sorted(found.parent for name in _CHECKPOINT for found in path.glob(f"*/{name}"))
        hint = f"did you mean {inside[0]}?" if inside else "give the folder that the model was saved in."
        raise ArgumentTypeError(f"a model's folder must hold a config.json, {word} holds none: {hint}")
    if path.exists():
        raise ArgumentTypeError(f"a model must be a folder or a hub name, {word} is a file: give its folder.")
    if not _HUB_NAME.fullmatch(word):
        raise ArgumentTypeError(f"a model must be an existing folder or a hub name, there is no {word}{_near(path)}")
    return word


def file(word: str) -> str:
    """A file that exists."""
    path = Path(word)
    if path.is_dir():
        raise ArgumentTypeError(f"must be a file, {word} is a folder: name a file in it.")
    if not path.exists():
        raise ArgumentTypeError(f"must be a file that exists, there is no {word}{_near(path)}")
    return word


def folder(word: str) -> str:
    """A folder that exists."""
    if not Path(word).is_dir():
        seen = "is a file" if Path(word).exists() else "does not exist"
        raise ArgumentTypeError(f"must be a directory, {word} {seen}{_near(Path(word))}")
    return word


def new_file(word: str) -> Path:
    """A file that can be written: known before a minute of work is lost for want of its folder."""
    path = Path(word)
    if path.is_dir():
        raise ArgumentTypeError(f"must be a file to write, {word} is a folder: add a file name.")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"the folder of a file to write must exist, there is no {path.parent}: make it first.")
    return path


def duration(backbone: str) -> str:
    """Roughly how long `st-btok check` takes, from the size of the weights; for the first line that it prints.

    Measured on one core with 3.3, 57 and 180 million parameters: 15 seconds to import and build, then 0.17 seconds for
    each million. A larger model is beyond what was measured.
    """
    millions = sum(map(_parameters, Path(backbone).glob("*.safetensors"))) / 1e6
    if not millions:
        return (
            "Checking on the CPU: roughly 20 seconds for 3 million parameters, a minute for 200 million, 7 minutes "
            "for 2 billion, besides a download."
        )
    seconds = 15 + 0.2 * millions
    text = f"{round(seconds, -1):.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    return f"Checking on the CPU: roughly {text} for {millions:,.1f} million parameters."


def _parameters(file: Path) -> int:
    """Number of values in a safetensors file, by its header; 0 where that can't be read."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, 100_000_000)))  # the format's own limit
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):  # loading will say what is wrong
        return 0


def near_word(word: str, words: Iterable[str]) -> str:
    """` (did you mean X?)` where one of the words is near, else nothing."""
    near = get_close_matches(word, list(words), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def near_path(word: str) -> str:
    """The same for the names beside a path that does not exist."""
    path = Path(word)
    if path.exists() or not path.parent.is_dir():
        return ""
    names = {str(found.relative_to(path.parent)): str(found) for found in path.parent.iterdir()}
    near = get_close_matches(path.name, list(names), n=1)
    return f" (did you mean {names[near[0]]}?)" if near else ""


def _near(path: Path) -> str:
    """The end of a message: the nearest path, or what to do."""
    return near_path(str(path)) or f" (looked from {Path.cwd()}): check the spelling."
