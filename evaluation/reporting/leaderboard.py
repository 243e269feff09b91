"""A model's results in the form of the MMEB leaderboard's submission file."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from evaluation.mmeb_v2.visdoc_rows import BROKEN_PAGE_HUB_IDS
from evaluation.ranking_metrics import CUTOFFS
from evaluation.reporting.scores import MODALITIES, ModelScores, Score, expected_datasets

# the leaderboard's name of a metric -> the one results are stored under
_NAMES = {
    "hit": "hit_rate",
    "ndcg_linear": "ndcg",
    "ndcg_exponential": "ndcg_exponential",
    "precision": "precision",
    "recall": "recall",
    "f1": "f1",
    "map": "map_official",
    "mrr": "mrr",
}


def leaderboard_entry(model: ModelScores) -> dict[str, Any]:
    """The submission file of one model.

    Args:
        model: The scores.

    Returns:
        `metadata` and `metrics` -> modality -> data set -> score object with eight metrics at 1, 5 and 10; a missing
        data set is `FILE_N/A`. Scores read from elsewhere (published ones) have their main metric alone.
    """
    metrics: dict[str, dict[str, Any]] = {modality: {} for modality in MODALITIES}
    for name, (modality, _) in expected_datasets().items():
        fixed = name in BROKEN_PAGE_HUB_IDS and model.split_label == "page-fixed"
        score = model.scores.get(name)
        metrics[modality][f"{name}-fixed" if fixed else name] = "FILE_N/A" if score is None else _entry(score)
    meta = model.metadata
    return {
        "metadata": {
            "model_name": model.name,
            "model_revision": model.revision,
            "model_backbone": meta.get("adapted_from"),
            "model_size": meta.get("n_parameters"),
            "embedding_dimension": meta.get("embed_dim"),
            "max_length_tokens": meta.get("max_tokens"),
            "model_release_date": meta.get("release_date"),
            "data_source": "Self-Reported",
            "url": meta.get("reference"),
            "report_generated_date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "split": model.split_label,
            "protocol": model.protocol,
        },
        "metrics": metrics,
    }


def _entry(score: Score) -> dict[str, Any]:
    values = {
        f"{theirs}@{k}": score.details[f"{stored}_at_{k}"]
        for theirs, stored in _NAMES.items()
        for k in CUTOFFS
        if f"{stored}_at_{k}" in score.details
    }
    return {**values, score.metric: score.value, "num_pred": score.num_queries, "num_data": score.expected_queries}
