"""A picture of queries with their top results, right ones framed green and wrong ones red."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.task import MMEBRetrieval

RIGHT, WRONG, ASKED = "#2e8b57", "#c0392b", "#555555"


def retrieval_sheet(
    task: MMEBRetrieval,
    predictions: str | Path,
    path: str | Path,
    *,
    num_queries: int = 6,
    top: int = 5,
    seed: int = 0,
) -> Path:
    """Write the sheet of one task.

    Args:
        task: The task; its data are loaded if needed.
        predictions: File that mteb wrote with `prediction_folder` (`<task>_predictions.json`).
        path: PNG to write.
        num_queries: Rows.
        top: Results per row.
        seed: Seed of the choice of queries: half hits and half misses where both exist.

    Returns:
        `path`.

    Raises:
        ValueError: The file holds no ranking of this task's queries.
    """
    task.load_data()
    data = task.dataset["default"][task.eval_split]
    rankings = json.loads(Path(predictions).read_text(encoding="utf-8"))["default"][task.eval_split]
    queries = {query_id: i for i, query_id in enumerate(data["queries"]["id"]) if query_id in rankings}
    if not queries:
        raise ValueError(f"{predictions} ranks none of the queries of {task.metadata.name}: was it another task?")
    documents = {document_id: i for i, document_id in enumerate(data["corpus"]["id"])}
    ranked = {q: sorted(rankings[q], key=lambda d: (rankings[q][d], d), reverse=True)[:top] for q in queries}
    chosen = _choose(ranked, data["relevant_docs"], num_queries, seed)
    figure = Figure(figsize=(2.2 * (top + 1), 1.9 * len(chosen)), dpi=120)
    grid = figure.subplots(len(chosen), top + 1, squeeze=False)
    for line, query_id in zip(grid, chosen, strict=True):
        _draw(line[0], data["queries"][queries[query_id]], ASKED, "query")
        for rank, axes in enumerate(line[1:]):
            if rank >= len(ranked[query_id]):
                axes.axis("off")
                continue
            document = ranked[query_id][rank]
            grade = data["relevant_docs"][query_id].get(document, 0)
            title = f"{rank + 1}: {'right' if grade else 'wrong'}" + (f" (grade {grade})" if grade > 1 else "")
            _draw(axes, data["corpus"][documents[document]], RIGHT if grade else WRONG, title)
    figure.suptitle(f"{task.metadata.name}, split {task.split_label}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    return Path(path)


def _choose(ranked: dict[str, list[str]], relevant: Any, count: int, seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(sorted(ranked)).tolist()
    hits = [q for q in order if ranked[q] and ranked[q][0] in relevant[q]]
    misses = [q for q in order if q not in set(hits)]
    half = count // 2
    take_misses = min(len(misses), max(half, count - len(hits)))
    return [*hits[: count - take_misses], *misses[:take_misses]]


def _draw(axes: Axes, record: dict[str, Any], colour: str, title: str) -> None:
    """Image, or up to four frames in order (side by side, wide ones under each other), above the text."""
    pictures = [np.asarray(record["image"].convert("RGB"))] if record.get("image") is not None else []
    if record.get("video") is not None:
        frames = record["video"].images()
        shown = frames[:: max(1, len(frames) // 4)][:4]
        pictures = _with_gaps([np.asarray(frame.resize(frames[0].size)) for frame in shown])
    text = textwrap.shorten(record.get("text") or "", 110)
    if pictures:
        axes.imshow(np.concatenate(pictures, axis=_direction(pictures[0])))
        axes.set_xlabel("\n".join(textwrap.wrap(text, 30)), fontsize=7, parse_math=False)  # dollars are dollars
    else:
        axes.text(0.5, 0.5, "\n".join(textwrap.wrap(text, 24)), ha="center", va="center", fontsize=8, parse_math=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    axes.set_title(title, fontsize=8, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2.5)


def _direction(picture: np.ndarray) -> int:
    return 0 if picture.shape[1] > 1.5 * picture.shape[0] else 1


def _with_gaps(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Grey lines between frames, or two of them could be read as one picture."""
    shape = list(pictures[0].shape)
    shape[_direction(pictures[0])] = 2
    line = np.full(shape, 128, np.uint8)
    return [part for picture in pictures for part in (picture, line)][:-1]
