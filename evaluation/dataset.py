"""The form of one MMEB-V2 row, and the nine meta-task groups."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal, get_args

Modality = Literal["image", "video", "visdoc"]
Protocol = Literal["vlm2vec", "btoks"]
PROTOCOLS: tuple[Protocol, ...] = ("vlm2vec", "btoks")
"""Whose rules decide pools and texts: the benchmark's harness (the default everywhere), or the paper's release."""

PageSplit = Literal["page-fixed", "page"]
PAGE_SPLITS: tuple[PageSplit, ...] = get_args(PageSplit)
"""Versions of the two `-page` data sets; see `mmeb_v2.visdoc.with_page_split`."""
PoolingName = Literal["lasttoken", "mean", "weightedmean"]
POOLINGS: tuple[PoolingName, ...] = get_args(PoolingName)
"""Poolings of a backbone that need no training; see `baselines.pooled_model`."""
InstructionPlace = Literal["user", "system", "none"]
INSTRUCTION_PLACES: tuple[InstructionPlace, ...] = get_args(InstructionPlace)
NUM_FRAMES = 8
"""Frames of a video that the benchmark's harness and the paper's release show."""

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
class InputSettings:
    """How MMEB-V2's inputs are shown to a model; anything but the defaults is part of every stored name.

    Args:
        num_frames: Frames of a video, evenly spread over the stored ones (at most 64 are stored). Default 8, as the
            harness and the paper's release show.
        instruction: Where the task's instruction stands. `user` (default): in the text, as the harness writes it.
            `system`: it is given to `encode` as the prompt, which chat templates show as a system turn, and the text
            is the bare caption, question or label. `none`: it is left out, and the model's own prompts stand.
        candidate_instruction: Instruction of every candidate, in place of the data set's own (labels and options have
            none), at the place that `instruction` names. Default: the data set's own.
        model_prompts: Whether the model's own prompts stay beside the task's instruction; by default the task's
            instruction takes their place, as two instructions are what no model was trained on.
    """

    num_frames: int = NUM_FRAMES
    instruction: InstructionPlace = "user"
    candidate_instruction: str = ""
    model_prompts: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.num_frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.num_frames}: the default is {NUM_FRAMES}")
        if self.instruction not in INSTRUCTION_PLACES:
            raise ValueError(f"instruction must be one of {INSTRUCTION_PLACES}, got {self.instruction!r}")
        if self.candidate_instruction and self.instruction == "none":
            raise ValueError("instruction 'none' leaves every instruction out: use user or system for the candidates'")

    @property
    def label(self) -> str:
        """The settings that aren't the defaults, as they stand in stored names: `.frames64.instruction-system`."""
        parts = [f"frames{self.num_frames}"] if self.num_frames != NUM_FRAMES else []
        parts += [f"instruction-{self.instruction}"] if self.instruction != "user" else []
        if self.candidate_instruction:
            parts.append(f"candidates-{hashlib.sha256(self.candidate_instruction.encode()).hexdigest()[:8]}")
        return "".join(f".{part}" for part in [*parts, *(["model-prompts"] if self.model_prompts else [])])


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
        inputs: How its inputs are shown.
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
    inputs: InputSettings = field(default_factory=InputSettings)
