"""What the validation of a training found, in a file of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_NOISE = re.compile(r"_(runtime|samples_per_second|steps_per_second)$|^epoch$")


class WriteScores(TrainerCallback):
    """Writes a line of JSON for every scored step, from the Trainer's log, so that a resumed training has them all.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer after each evaluation, once its scores are in the log."""
        if not state.is_world_process_zero:
            return
        scores: dict[int, dict[str, float]] = {}
        for entry in state.log_history:
            found = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            found = {name: value for name, value in found.items() if not _NOISE.search(name)}
            if found:
                scores.setdefault(entry["step"], {}).update(found)
        lines = [json.dumps({"step": step, **found}) for step, found in sorted(scores.items())]
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
