"""The MMEB-V2 training mix: 25 sources, their wording, weights and generated sides, as `mmeb_train.json` lists them.

Taken from the configurations of the two public trainings on this mix: VLM2Vec-V2 (github TIGER-AI-Lab/VLM2Vec,
commit 6e1e1d4, `experiments/public/train/train_alltasks.yaml`) and the BToks release (github siryuson/
BottleneckTokens, commit 896c2df, `configs/datasets/btoks_mmeb_train.yaml`). Both use the same weights; the generated
sides are the latter's `ntp_side`. Row counts are those of the release after its leak filter, for orientation only.
Where the two trainings differ, ours follows the release; docs/evaluate.md has the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Family = Literal["mmeb", "colpali", "visrag", "video_caption", "caption_video", "video_qa"]


@dataclass(frozen=True, kw_only=True)
class MMEBTrainSource:
    """One source of the mix.

    Args:
        name: Name in the configurations, and of the hub configuration for the family `mmeb`.
        meta_task: Meta-task it trains.
        family: How rows are read; `mmeb_train.py` has one reader per family.
        hub_id: Data set repository.
        query_instruction: Starts the query's text; not generated.
        positive_instruction: Starts the positive's text; not generated.
        target: The side that is generated.
        weight: Share in the mix; the shares add up to 52.
        num_rows: Usable rows reported by the release.
        config: Hub configuration.
        split: Hub split.
        file: Annotation file inside the repository, for `jsonl` sources.
        media_roots: Folders below the data root that may hold the media, first match wins: an unpacked snapshot of
            the repository under its full or short name, or the folders of VLM2Vec's download script.
        alternative_id: Unused; read by `evaluation.mmeb_v2.sources`.
        annotation: Unused; read by `evaluation.mmeb_v2.sources`.
        revision: Hub commit, `None` for the newest.
    """

    name: str
    meta_task: str
    family: Family
    hub_id: str
    query_instruction: str
    positive_instruction: str
    target: Literal["query", "positive", "both", "none"]
    weight: float
    num_rows: int
    config: str | None = None
    split: str = "train"
    file: str = ""
    media_roots: tuple[str, ...] = ()
    alternative_id: str = ""
    annotation: str = ""
    revision: str | None = None


_UNPACKED = ("TIGER-Lab/MMEB-train", "MMEB-train", "vlm2vec_train/MMEB-train")
_VIDEOS = "train_video_and_instruction"
_VIDEO_FILES = {"video_qa": "video_240k_caption_15k.jsonl"}
# What all sources of a family share, beside those of `mmeb`, whose hub configurations have their names.
_SHARED: dict[str, dict[str, Any]] = {
    "colpali": {"hub_id": "vidore/colpali_train_set"},  # a page and a question to the answer's text
    "visrag": {"hub_id": "openbmb/VisRAG-Ret-Train-In-domain-data"},  # wordings by the row's column `source`
}


def _source(row: dict[str, Any]) -> MMEBTrainSource:
    family = row["family"]
    if family == "mmeb":
        shared = {
            "hub_id": "TIGER-Lab/MMEB-train",
            "config": row["name"],
            "split": "original",  # the other split, diverse_instruction, is used by neither training
            # Rows name images/<set>/...; VLM2Vec's configuration has one folder more: MMEB-train/image/images/<set>
            "media_roots": (*(f"{root}{folder}" for root in _UNPACKED for folder in ("", "/image")), ""),
        }
    elif family in _SHARED:
        shared = _SHARED[family]
    else:
        places = (f"ShareGPTVideo/{_VIDEOS}", _VIDEOS, f"vlm2vec_train/{_VIDEOS}", "vlm2vec_train/video", "video", "")
        file = _VIDEO_FILES.get(family, "video_caption_300k.jsonl")
        shared = {"hub_id": places[0], "file": f"video_instruction/train/sft/{file}", "media_roots": places}
    return MMEBTrainSource(**row, **shared)


_DATA = json.loads((Path(__file__).parent / "mmeb_train.json").read_text(encoding="utf-8"))
MMEB_TRAIN: tuple[MMEBTrainSource, ...] = tuple(_source(row) for row in _DATA["sources"])
# Wordings of visrag-indomain by the row's column `source`; an unknown source has none.
VISRAG_QUERY: dict[str, str] = _DATA["visrag_query"]
VISRAG_PAGE: dict[str, str] = _DATA["visrag_page"]
