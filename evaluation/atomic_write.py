"""Files that are whole or not there: written beside their place and renamed, and set aside where they are torn."""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def atomic_write(path: Path, content: str | Callable[[Path], object], *, replace: bool = True) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part, also after a power cut.

    Args:
        path: Its place; the folder exists.
        content: Its text, or a function that writes the file it is given.
        replace: Whether a file that is there gives way (default); without it the first of two processes wins.
    """
    # host and process stand in the name, so that what a killed process left behind can be told from work in progress
    unique = f"{socket.gethostname()}.{uuid.uuid4().hex[:8]}.{os.getpid()}"
    part = path.with_name(f"{path.name}.{unique}.unfinished")
    try:
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            content(part)
        to_disk(part)
        if replace:
            part.replace(path)
        else:
            with suppress(FileExistsError):
                os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk; else a power cut could leave a new name without the content."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """The content of a JSON file; a torn one is set aside.

    Args:
        path: The file.

    Returns:
        Its content, `None` where there is no file or it was torn.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no UTF-8
        set_aside(path, error)
        return None


def set_aside(path: Path, error: Exception) -> None:
    """Rename a torn file to `<name>.torn` and say so; nothing reads it there."""
    torn = path.with_name(f"{path.name}.torn")
    path.replace(torn)
    logger.warning("%s was torn while it was written (%s); it now is %s and is made again", path, error, torn.name)
