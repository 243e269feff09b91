"""The 78 data sets of MMEB-V2, one frozen row each: data, no logic.

36 image, 18 video and 24 visual-document data sets in nine meta-task groups. The rows of one modality are in
`image_rows.py`, `video_rows.py` and `visdoc_rows.py`; here they are put together. Names, counts, texts and
media locations are those of the official evaluator (github TIGER-AI-Lab/VLM2Vec, commit 6e1e1d4). The hub revisions
behind the published scores are not recorded in any source we know, so `revision` is None: every result says which
commit, or which local files, it was measured on, and `--revision NAME=COMMIT` (or `revisions=`) pins one.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.dataset import GROUPS, MMEBDataset
from evaluation.mmeb_v2.image_rows import IMAGE_DATASETS
from evaluation.mmeb_v2.video_rows import VIDEO_DATASETS
from evaluation.mmeb_v2.visdoc_rows import VISDOC_DATASETS

__all__ = ["GROUPS", "MMEB_V2", "MMEBDataset", "select_rows"]

MMEB_V2: tuple[MMEBDataset, ...] = (*IMAGE_DATASETS, *VIDEO_DATASETS, *VISDOC_DATASETS)


def select_rows(subset: Sequence[str] | None = None) -> tuple[MMEBDataset, ...]:
    """The rows that a list of names stands for.

    Args:
        subset: Data-set names, groups (`I-CLS`), subgroups (`ViDoRe-V2`) or modalities; `None`: all 78. `MSCOCO` is a
            data set.

    Returns:
        Rows in the leaderboard's order.

    Raises:
        ValueError: A name that fits nothing.
    """
    if subset is None:
        return MMEB_V2
    known = {label for row in MMEB_V2 for label in (row.name, row.group, row.subgroup, row.modality) if label}
    unknown = sorted(set(subset) - known)
    if unknown:
        raise ValueError(f"unknown subset {unknown}: use a data-set name, a modality or one of {list(GROUPS)}")
    return tuple(row for row in MMEB_V2 if {row.name, row.group, row.subgroup, row.modality} & set(subset))
