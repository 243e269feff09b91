"""What the validation of a training found, in a file of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from evaluation import markdown

SCORES = "validation.jsonl"
_SHOWN = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "accuracy@1": "hit@1"}
_NOISE = re.compile(r"_(runtime|samples_per_second|steps_per_second)$|^epoch$")


class WriteScores(TrainerCallback):
    """Writes a line of JSON for every scored step, from the Trainer's log, so that a resumed training has them all.

    With `load_best_model_at_end` the line of the step whose weights are saved says so at the end: `"saved": true`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each evaluation, once its scores are in the log."""
        self._write(state, None)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer once the best checkpoint is loaded."""
        if args.load_best_model_at_end and self.path.is_file():
            self._write(state, state.best_global_step)

    def _write(self, state: TrainerState, saved: int | None) -> None:
        if not state.is_world_process_zero:
            return
        scores: dict[int, dict[str, float]] = {}
        for entry in state.log_history:
            found = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            found = {name: value for name, value in found.items() if not _NOISE.search(name)}
            if found:
                scores.setdefault(entry["step"], {}).update(found)
        lines = [
            json.dumps({"step": step, **found, **({"saved": True} if step == saved else {})})
            for step, found in sorted(scores.items())
        ]
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def before_and_after(path: Path) -> str:
    """The first scores of the held-out rows in a file of `WriteScores`, and those of the saved model, in per cent.

    The saved model is that of the last step, unless a line says that it is the saved one's.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], next((line for line in lines if line.get("saved")), lines[-1])
    searches = [name.removesuffix("_cosine_ndcg@10") for name in last if name.endswith("_cosine_ndcg@10")]
    rows = []
    for search in searches:
        name, backwards = search.removesuffix("-backwards"), search.endswith("-backwards")
        cells = [f"{name}: {'positive → query' if backwards else 'query → positive'}"]
        for measure in _SHOWN:
            before, after = (scores.get(f"{search}_cosine_{measure}") for scores in (first, last))
            cells.append(f"{_percent(before)} → {_percent(after)}")
        rows.append(cells)
    if not rows:
        rows = [["all", f"{_percent(first.get('sequential_score'))} → {_percent(last.get('sequential_score'))}"]]
    head = ["held-out rows", *list(_SHOWN.values())[: len(rows[0]) - 1]]
    return (
        f"Before (step {first['step']}) → after (step {last['step']}), in %:\n\n" + markdown.table(head, rows) + "\n"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
