"""The MMEB-V2 training mix as data: one frozen row per source, 25 sources, their wording, weights and generated side.

Taken from the configurations of the two public trainings on this mix: VLM2Vec-V2 (github TIGER-AI-Lab/VLM2Vec,
commit 6e1e1d4, `experiments/public/train/train_alltasks.yaml`) and the BToks release (github siryuson/
BottleneckTokens, commit 896c2df, `configs/datasets/btoks_mmeb_train.yaml`). Both use the same weights; the generated
sides are the latter's `ntp_side`. Row counts are those of the release after its leak filter, for orientation only.
Where the two trainings differ, ours follows the release; docs/evaluate.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


def _mmeb(
    name: str, meta_task: str, query: str, positive: str, target: str, weight: float, num_rows: int
) -> MMEBTrainSource:
    return MMEBTrainSource(
        name=name,
        meta_task=meta_task,
        family="mmeb",
        hub_id="TIGER-Lab/MMEB-train",
        config=name,
        split="original",  # the other split, diverse_instruction, is used by neither training
        query_instruction=query,
        positive_instruction=positive,
        target=target,  # type: ignore[arg-type]
        weight=weight,
        num_rows=num_rows,
        # rows name images/<set>/...; VLM2Vec's configuration has one folder more, MMEB-train/image/images/<set>/...
        media_roots=tuple(f"{root}{folder}" for root in _UNPACKED for folder in ("", "/image")) + ("",),
    )


def _hound(name: str, task: str, query: str, positive: str, target: str, num_rows: int) -> MMEBTrainSource:
    short = "train_video_and_instruction"
    return MMEBTrainSource(
        name=name,
        meta_task={"video_caption": "V-RET", "caption_video": "V-RET", "video_qa": "V-QA"}[task],
        family=task,  # type: ignore[arg-type]
        hub_id=f"ShareGPTVideo/{short}",
        file="video_instruction/train/sft/"
        + ("video_240k_caption_15k.jsonl" if task == "video_qa" else "video_caption_300k.jsonl"),
        query_instruction=query,
        positive_instruction=positive,
        target=target,  # type: ignore[arg-type]
        weight=5,
        num_rows=num_rows,
        media_roots=(f"ShareGPTVideo/{short}", short, f"vlm2vec_train/{short}", "vlm2vec_train/video", "video", ""),
    )


_ASK = "Represent the given image with the following question:"
_PLAIN = "Represent the given image."

MMEB_TRAIN: tuple[MMEBTrainSource, ...] = (
    _mmeb("ImageNet_1K", "I-CLS", "Represent the given image for classification", "", "positive", 1, 100_000),
    _mmeb(
        "N24News",
        "I-CLS",
        "Represent the given news image with the following caption for domain classification:",
        "",
        "positive",
        1,
        48_988,
    ),
    _mmeb(
        "HatefulMemes",
        "I-CLS",
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or "
        "not",
        "",
        "positive",
        0.5,
        8_500,
    ),
    _mmeb("VOC2007", "I-CLS", "Identify the object shown in the image", "", "positive", 0.5, 7_844),
    _mmeb("SUN397", "I-CLS", "Identify the scene shown in the image", "", "positive", 0.5, 19_850),
    _mmeb("OK-VQA", "I-QA", _ASK, "", "positive", 0.5, 9_007),
    _mmeb("A-OKVQA", "I-QA", _ASK, "", "positive", 0.5, 17_055),
    _mmeb("DocVQA", "I-QA", _ASK, "", "positive", 1, 39_463),
    _mmeb("InfographicsVQA", "I-QA", _ASK, "", "positive", 0.5, 23_946),
    _mmeb("ChartQA", "I-QA", _ASK, "", "positive", 0.5, 28_299),
    _mmeb("Visual7W", "I-QA", _ASK, "", "positive", 1, 69_817),
    _mmeb(
        "VisDial",
        "I-RET",
        "Represent the given dialogue about an image, which is used for image retrieval:",
        "Represent the given image",
        "query",
        1,
        123_287,
    ),
    _mmeb(
        "CIRR",
        "I-RET",
        "Given an image, find a similar everyday image with the described changes:",
        _PLAIN,
        "none",
        0.5,
        26_116,
    ),
    _mmeb("VisualNews_t2i", "I-RET", "Retrieve an image of this news caption.", _PLAIN, "query", 1, 99_903),
    _mmeb("VisualNews_i2t", "I-RET", "Find a caption for the news in the given photo.", "", "positive", 1, 100_000),
    _mmeb(
        "MSCOCO_t2i", "I-RET", "Find me an everyday image that matches the given caption:", _PLAIN, "query", 1, 100_000
    ),
    _mmeb(
        "MSCOCO_i2t",
        "I-RET",
        "Find an image caption describing the given everyday image.",
        "",
        "positive",
        1,
        113_287,
    ),
    _mmeb(
        "NIGHTS",
        "I-RET",
        "Find a day-to-day image that looks similar to the provided image.",
        _PLAIN,
        "none",
        0.5,
        15_941,
    ),
    _mmeb(
        "WebQA",
        "I-RET",
        "Find a Wikipedia image that answers this question:",
        "Represent the given Wikipedia image with related text information:",
        "both",
        0.5,
        17_166,
    ),
    _mmeb(
        "MSCOCO",
        "I-VG",
        "Select the portion of the image that isolates the object labeled as",
        "Represent the given cropped image of the object",
        "query",
        1,
        100_000,
    ),
    MMEBTrainSource(
        name="colpali_train_set",
        meta_task="VisDoc",  # a page and a question to the answer's text, not a question to its page
        family="colpali",
        hub_id="vidore/colpali_train_set",
        query_instruction="",
        positive_instruction="",
        target="positive",
        weight=10,
        num_rows=118_195,
    ),
    MMEBTrainSource(
        name="visrag-indomain",
        meta_task="VisDoc",
        family="visrag",
        hub_id="openbmb/VisRAG-Ret-Train-In-domain-data",
        query_instruction="",  # by the row's `source`: VISRAG_QUERY
        positive_instruction="",  # VISRAG_PAGE
        target="query",
        weight=12,
        num_rows=122_752,
    ),
    _hound("video_caption_300k", "video_caption", "", "", "positive", 301_751),
    _hound(
        "video_caption_300k-video",
        "caption_video",
        "Find a video that contains the following visual content:",
        "Understand the content of the provided video:",
        "query",
        301_751,
    ),
    _hound(
        "video_qa_240k",
        "video_qa",
        "Answer a question based on the content of a video.",
        "",
        "positive",
        255_000,
    ),
)

# Wordings of visrag-indomain by the row's column `source`; an unknown source has none.
VISRAG_QUERY = {
    "NeurIPS Papers": "This query is about a research paper from NeurIPS, a leading AI/ML conference. The document "
    "contains technical discussions, methodologies, and findings. Identify relevant papers and sections that address "
    "the query: ",
    "Textbooks": "This query is related to a college-level textbook, which provides structured explanations, "
    "definitions, and examples. Find the most relevant concepts or explanations that address the query: ",
    "ICML Papers": "This query is about a research paper from ICML, a leading AI/ML conference. The document contains "
    "theoretical insights, experiments, and applications. Identify relevant papers and sections that best answer the "
    "query: ",
    "Manuallib": "This query pertains to a product manual, which contains detailed technical specifications, usage "
    "instructions, and troubleshooting steps. Find the most relevant section that answers the query: ",
    "ArxivQA": "This query is related to retrieving a relevant figure from an ArXiv research paper. The retrieved "
    "figure should contain scientific plots, mathematical visualizations, or experimental results that best address "
    "the query: ",
    "ChartQA": "This query is related to retrieving a relevant chart that visually represents numerical or "
    "categorical data. The retrieved chart should contain bar graphs, line charts, or other visual elements necessary "
    "to analyze trends, compare values, or extract insights related to the query: ",
    "MP-DocVQA": "This query is related to retrieving a relevant page from a multi-page document, such as reports, "
    "invoices, or research papers. The retrieved document should contain text, tables, or structured information "
    "necessary to answer the query: ",
    "InfoVQA": "This query is related to retrieving an infographic that visually presents statistical or factual "
    "information using charts, icons, and structured layouts. The retrieved image should contain the necessary visual "
    "elements to provide the best context for answering the query: ",
    "PlotQA": "This query relates to retrieving a relevant plot or chart that visually represents numerical data. The "
    "retrieved figure should contain the necessary information to analyze trends, compare values, or extract key "
    "insights related to the query: ",
    "SlideVQA": "This query is related to retrieving a relevant presentation slide that visually presents structured "
    "information. The retrieved slide should contain the necessary text, charts, or graphics to provide the best "
    "answer to the query: ",
}
VISRAG_PAGE = {
    "Textbooks": "A textbook page with structured educational content and explanations.",
    "ICML Papers": "A research paper from ICML, covering machine learning topics.",
    "NeurIPS Papers": "A research paper from NeurIPS on AI and ML topics.",
    "Manuallib": "A product manual page with technical specifications and instructions.",
    "InfoVQA": "An infographic with structured data, charts, and annotations.",
    "PlotQA": "A numerical data visualization, such as bar charts or line graphs.",
    "SlideVQA": "A presentation slide with text, bullet points, and diagrams.",
    "ArxivQA": "A figure from a research paper, including plots or experimental results.",
    "MP-DocVQA": "A page from a multi-page document with text or tables.",
    "ChartQA": "A statistical chart comparing values or analyzing trends.",
}
