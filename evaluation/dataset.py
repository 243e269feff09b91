"""The form of one MMEB-V2 row, and the nine meta-task groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Modality = Literal["image", "video", "visdoc"]
Protocol = Literal["vlm2vec", "btoks"]
PROTOCOLS: tuple[Protocol, ...] = ("vlm2vec", "btoks")
"""Whose rules decide pools and texts: the benchmark's harness (the default everywhere), or the paper's release."""

GROUPS: dict[str, Modality] = {
    "I-CLS": "image",
    "I-QA": "image",
    "I-RET": "image",
    "I-VG": "image",
    "V-CLS": "video",
    "V-QA": "video",
    "V-RET": "video",
    "V-MRET": "video",
    "VisDoc": "visdoc",
}
"""Meta-task group -> modality, in the leaderboard's order."""


@dataclass(frozen=True, kw_only=True)
class MMEBDataset:
    """One data set of MMEB-V2.

    Args:
        name: Name on the leaderboard (of the `page-fixed` split where a data set has two).
        modality: `image`, `video` or `visdoc`.
        group: One of the nine meta-task groups of `GROUPS`.
        family: How rows are read: the loaders have one function per family.
        hub_id: Data set repository with the annotations.
        metric: `hit@1` or `ndcg_linear@5`.
        candidates: `local`: a query ranks its own list; `global`: it ranks the whole corpus.
        query_text: Text of a query, a `str.format` template over the row's columns.
        candidate_text: Text of a candidate, a template; empty when the candidate is media alone.
        num_queries: Number of queries of the complete data set.
        config: Hub configuration (`None`: the default one).
        split: Hub split.
        revision: Hub commit, `None` for the newest.
        subgroup: Visual documents only: ViDoRe-V1, ViDoRe-V2, VisRAG or OOD.
        media_roots: Folders below the data root that may hold the media, first match wins; the official archive
            and the paper authors' unpacked copy differ.
        media_path: Video only: folder of a row's frames below a media root, a template over the row's columns.
        alternative_id: A second repository with the same configurations, whose texts already hold the instruction.
        annotation: Annotation file or folder inside the media repository, used when the hub copy is absent.
        subsets: Configurations read one after another and concatenated (MVBench).
        num_candidates: Size of the corpus (global) or of every list (local); `None` where unknown or varying.
        graded: Relevance has more than one positive grade.
        protocol: Whose rules decide pools and texts; see `mmeb_v2.protocols.with_protocol`.
    """

    name: str
    modality: Modality
    group: str
    family: str
    hub_id: str
    metric: Literal["hit@1", "ndcg_linear@5"]
    candidates: Literal["local", "global"]
    query_text: str
    candidate_text: str
    num_queries: int
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    subgroup: str = ""
    alternative_id: str = ""
    media_roots: tuple[str, ...] = ()
    media_path: str = ""
    annotation: str = ""
    subsets: tuple[str, ...] = ()
    num_candidates: int | None = None
    graded: bool = False
    protocol: Protocol = "vlm2vec"
