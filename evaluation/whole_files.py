"""Result files that are whole or not there: written beside their place and renamed, and set aside where they are torn.

mteb writes a result in place, so a full disk or a killed job leaves half a file, and every later run then ends in the
traceback of its JSON reader. Here such a file is renamed to `<name>.torn` with a message, and scored again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mteb import ResultCache
from mteb.models import ModelMeta
from mteb.results import TaskResult

logger = logging.getLogger(__name__)

SAVING = ".saving-"
"""Start of the name of a folder in which a result is being written."""


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old one or the new one, never a part.

    Args:
        path: Its place; the folder exists.
        text: Its content.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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


class WholeResultCache(ResultCache):
    """mteb's cache of results, with whole files only."""

    def save_to_cache(
        self,
        task_result: TaskResult,
        model_name: str | ModelMeta,
        model_revision: str | None = None,
        *,
        encode_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a result, the model's metadata and the settings; the result comes last, so it is never without them.

        Args:
            task_result: The result.
            model_name: The model's metadata, or its name.
            model_revision: Its revision, if a name is given.
            encode_kwargs: How it was encoded.
        """
        place = self.get_task_result_path(task_result.task_name, model_name, model_revision)
        place.parent.mkdir(parents=True, exist_ok=True)
        # beside the results: a rename is only atomic within one file system
        with TemporaryDirectory(dir=self.cache_path, prefix=SAVING) as folder:
            staging = ResultCache(folder)
            staged = staging.get_task_result_path(task_result.task_name, model_name, model_revision)
            staged.parent.mkdir(parents=True)
            settings = place.with_name("run_settings.jsonl")
            if settings.is_file():  # mteb adds this run to the ones that are there
                shutil.copy(settings, staged.parent)
            staging.save_to_cache(task_result, model_name, model_revision, encode_kwargs=encode_kwargs)
            for file in sorted(staged.parent.iterdir(), key=lambda file: file == staged):
                _to_disk(file)
                file.replace(place.with_name(file.name))

    def load_task_result(
        self,
        task_name: str,
        model_name: str | ModelMeta,
        model_revision: str | None = None,
        raise_if_not_found: bool = False,
        prioritize_remote: bool = False,
        experiment_name: str | None = None,
    ) -> TaskResult | None:
        """The stored result of a task, `None` where there is none or it was torn.

        Args:
            task_name: The task.
            model_name: The model's metadata, or its name.
            model_revision: Its revision, if a name is given.
            raise_if_not_found: Raise where there is none.
            prioritize_remote: Prefer mteb's own repository of results.
            experiment_name: Variant of the checkpoint.

        Returns:
            The result.
        """
        try:
            return super().load_task_result(
                task_name, model_name, model_revision, raise_if_not_found, prioritize_remote, experiment_name
            )
        except ValueError as error:  # json's and pydantic's errors are ValueErrors
            set_aside(self.get_task_result_path(task_name, model_name, model_revision, False, experiment_name), error)
            return None


def _to_disk(path: Path) -> None:
    """Or a power cut could leave the new name without the content."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
