"""mteb's cache of results with files that are whole or not there.

mteb writes a result in place, so a full disk or a killed job leaves half a file, and every later run then ends in the
traceback of its JSON reader. Here such a file is renamed to `<name>.torn` with a message, and scored again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mteb import ResultCache
from mteb.models import ModelMeta
from mteb.results import TaskResult

from evaluation.atomic_write import set_aside, to_disk

logger = logging.getLogger(__name__)

SAVING = ".saving-"
"""Start of the name of a folder in which a result is being written."""


class WholeResultCache(ResultCache):
    """mteb's cache of results, with whole files only, and none of other data.

    Args:
        cache_path: Its folder.
        revisions: Task -> the version of its data; a stored result of another version counts as absent. mteb keys its
            results by task and model alone. Our own tasks have a hash of their data in their names.
    """

    def __init__(self, cache_path: Path | str | None = None, revisions: Mapping[str, str] | None = None) -> None:
        super().__init__(cache_path)
        self._revisions = dict(revisions or {})

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
                to_disk(file)
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
            found = super().load_task_result(
                task_name, model_name, model_revision, raise_if_not_found, prioritize_remote, experiment_name
            )
        except ValueError as error:  # json's and pydantic's errors are ValueErrors
            set_aside(self.get_task_result_path(task_name, model_name, model_revision, False, experiment_name), error)
            return None
        wanted = self._revisions.get(task_name)
        if found is not None and wanted is not None and found.dataset_revision != wanted:
            logger.warning("%s is scored again: its data were %s, now %s", task_name, found.dataset_revision, wanted)
            return None
        return found
