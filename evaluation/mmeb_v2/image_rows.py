"""The 36 image rows of MMEB-V2.

All of them live in one hub repository, one configuration each. Every query brings its own candidate list, the
positive first. `text` candidates are strings (`tgt_text`), `image` candidates are images whose identity is their path
(`tgt_img_path`), `captioned` candidates are images whose identity is path and caption together.
"""

from __future__ import annotations

from evaluation.dataset import MMEBDataset

_CLASSIFY = "Represent the given image for classification\n"
_OBJECT = "Identify the object shown in the image\n"
_SCENE = "Identify the scene shown in the image\n"
_QUESTION = "Represent the given image with the following question: {qry_text}\n"
_SELECT = "Select the portion of the image that"
_WIKI_IMAGE = "Represent the given Wikipedia image with related text information: {tgt_text}\n"
_CROP = "Represent the given cropped image of the object"

# name -> query text; the candidates are the labels
_CLASSIFICATION = {
    "ImageNet-1K": _CLASSIFY,
    "N24News": "Represent the given news image with the following caption for domain classification: {qry_text}\n",
    "HatefulMemes": "Represent the given image for binary classification to determine whether it constitutes hateful "
    "speech or not\n",
    "VOC2007": _OBJECT,
    "SUN397": _SCENE,
    "Place365": _SCENE,
    "ImageNet-A": _CLASSIFY,
    "ImageNet-R": _CLASSIFY,
    "ObjectNet": _OBJECT,
    "Country211": "Identify the country depicted in the image\n",
}
_LABELS = {"HatefulMemes": 2}  # the only label-set size that the sources state for sure
_QUESTION_ANSWERING = "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA".split()
# name -> (family, query text, candidate text)
_RETRIEVAL = {
    "VisDial": (
        "image",
        "Represent the given dialogue about an image, which is used for image retrieval: {qry_text}\n\n",
        "Represent the given image\n",
    ),
    "CIRR": (
        "captioned",
        "Given an image, find a similar everyday image with the described changes: {qry_text}\n",
        "Represent the given image.",
    ),
    "VisualNews_t2i": (
        "image",
        "Retrieve an image of this news caption. {qry_text}\n",
        "Represent the given image.\n",
    ),
    "VisualNews_i2t": ("text", "Find a caption for the news in the given photo.\n", "{tgt_text}"),
    "MSCOCO_t2i": (
        "image",
        "Find me an everyday image that matches the given caption: {qry_text}\n",
        "Represent the given image.\n",
    ),
    "MSCOCO_i2t": ("text", "Find an image caption describing the given everyday image.\n", "{tgt_text}"),
    "NIGHTS": (
        "captioned",
        "Find a day-to-day image that looks similar to the provided image.\n",
        "Represent the given image.",
    ),
    "WebQA": ("image", "Find a Wikipedia image that answers this question: {qry_text}\n", _WIKI_IMAGE),
    "FashionIQ": (
        "captioned",
        "Find an image to match the fashion image and style note: {qry_text}\n",
        "Represent the given image.",
    ),
    "Wiki-SS-NQ": (
        "image",
        "Find the document image that can answer the given query: {qry_text}\n",
        "Represent the given image\n",
    ),
    "OVEN": (
        "captioned",
        "Retrieve a Wikipedia image-description pair that provides evidence for the question of this image: "
        "{qry_text}\n",
        _WIKI_IMAGE,
    ),
    "EDIS": (
        "image",
        "Find a news image that matches the provided caption: {qry_text}\n",
        "Represent the given image with related text information: {tgt_text}\n",
    ),
}
# name -> (query text, candidate text); qry_text comes in double quotes, "to to" is in the data
_GROUNDING = {
    "MSCOCO": ("Crop the image to to isolate the object labeled as {qry_text}\n", _CROP),
    "RefCOCO": (f"{_SELECT} follows the language expressions. {{qry_text}}\n", _CROP),
    "RefCOCO-Matching": (
        f"{_SELECT} follows the language expressions: {{qry_text}}\n",
        f"{_SELECT} follows the language expressions: {{tgt_text}}\n",
    ),
    "Visual7W-Pointing": (f"{_SELECT} answers the question {{qry_text}}\n", _CROP),
}


def _row(name: str, group: str, family: str, query_text: str, candidate_text: str) -> MMEBDataset:
    return MMEBDataset(
        name=name,
        modality="image",
        group=group,
        family=family,
        hub_id="ziyjiang/MMEB_Test_Instruct",
        alternative_id="TIGER-Lab/MMEB-eval",
        config=name,
        metric="hit@1",
        candidates="local",
        query_text=query_text,
        candidate_text=candidate_text,
        num_queries=1000,
        num_candidates=_LABELS.get(name),
        media_roots=("image-tasks", "image-tasks/MMEB"),
    )


IMAGE_DATASETS: tuple[MMEBDataset, ...] = (
    *(_row(name, "I-CLS", "text", text, "{tgt_text}") for name, text in _CLASSIFICATION.items()),
    *(_row(name, "I-QA", "text", _QUESTION, "{tgt_text}") for name in _QUESTION_ANSWERING),
    *(_row(name, "I-RET", *rest) for name, rest in _RETRIEVAL.items()),
    *(_row(name, "I-VG", "captioned", *texts) for name, texts in _GROUNDING.items()),
)
"""The image rows in the leaderboard's order."""
