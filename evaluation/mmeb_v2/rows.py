"""The 78 data sets of MMEB-V2, one frozen row each: data, no logic.

36 image, 18 video and 24 visual-document data sets in nine meta-task groups. The rows of one modality are in
`image_rows.py`, `video_rows.py` and `visdoc_rows.py`; here they are put together. Names, counts, texts and
media locations are those of the official evaluator (github TIGER-AI-Lab/VLM2Vec, commit 6e1e1d4). The hub revisions
behind the published scores are not recorded in any source we know, so `revision` is None: every result says which
commit, or which local files, it was measured on, and `--revision NAME=COMMIT` (or `revisions=`) pins one.
"""

from __future__ import annotations

from evaluation.dataset import GROUPS, MMEBDataset
from evaluation.mmeb_v2.image_rows import IMAGE_DATASETS
from evaluation.mmeb_v2.video_rows import VIDEO_DATASETS
from evaluation.mmeb_v2.visdoc_rows import VISDOC_DATASETS

__all__ = ["GROUPS", "MMEB_V2", "MMEBDataset"]

MMEB_V2: tuple[MMEBDataset, ...] = (*IMAGE_DATASETS, *VIDEO_DATASETS, *VISDOC_DATASETS)
