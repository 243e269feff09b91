"""Every source of the MMEB-V2 training mix in small, in the layout of its hub repository, broken rows among them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from recipes.data.mmeb_train_sources import MMEB_TRAIN, MMEBTrainSource
from tests.backbones import picture

# Rows of the hub: (query, has an image, positive, has an image, negative), and the texts the model gets.
RAW: dict[str, tuple[str, bool, str, bool, str | None]] = {
    "ImageNet_1K": ("<|image_1|>\nRepresent the given image for classification\n", True, "plane {i}", False, ""),
    "N24News": (
        "<|image_1|>\nRepresent the given news image with the following caption for domain classification: "
        "caption {i}\n",
        True,
        "Theater {i}",
        False,
        "Global Business",
    ),
    "HatefulMemes": (
        "<|image_1|>\nRepresent the given image for binary classification to determine whether it constitutes hateful "
        "speech or not\n",
        True,
        "Yes",
        False,
        "No",
    ),
    "VOC2007": ("<|image_1|>\nIdentify the object shown in the image\n", True, "car {i}", False, ""),
    "SUN397": ("<|image_1|>\nIdentify the scene shown in the image\n", True, "abbey {i}", False, ""),
    "ChartQA": (
        "<|image_1|>\nRepresent the given image with the following question: Is the value {i} in 2015?\n",
        True,
        "Yes {i} \t",
        False,
        "No ",
    ),
    "VisDial": (
        "Represent the given dialogue about an image, which is used for image retrieval: Q:is this a child {i}\n"
        "A:adult\n",
        False,
        "<|image_1|>\nRepresent the given image\n",
        True,
        None,
    ),
    "CIRR": (
        "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: Many hamster {i}.\n",
        True,
        "<|image_1|>\nRepresent the given image.\n",
        True,
        None,
    ),
    "VisualNews_t2i": (
        "Retrieve an image of this news caption. Caption {i}.\n",
        False,
        "<|image_1|>\nRepresent the given image.\n",
        True,
        "",
    ),
    "VisualNews_i2t": ("<|image_1|>\nFind a caption for the news in the given photo.\n", True, "News {i}.", False, ""),
    "MSCOCO_t2i": (
        "Find me an everyday image that matches the given caption: A teddy bear shop {i}.\n",
        False,
        "<|image_1|>\nRepresent the given image.\n",
        True,
        None,
    ),
    "MSCOCO_i2t": (
        "<|image_1|>\nFind an image caption describing the given everyday image.\n",
        True,
        "A skateboarder {i}.",
        False,
        "",
    ),
    "NIGHTS": (
        "<|image_1|>\nFind a day-to-day image that looks similar to the provided image.\n",
        True,
        "<|image_1|>\nRepresent the given image.\n",
        True,
        "",
    ),
    "WebQA": (
        "<|image_1|>\nFind a Wikipedia image that answers this question: Which body part {i}?\n",
        False,
        "<|image_1|>\nRepresent the given Wikipedia image with related text information: 1913-D {i}.\n",
        True,
        "",
    ),
    "MSCOCO": (
        '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "hot dog {i}"\n',
        True,
        "<|image_1|>\nRepresent the given cropped image of the object",
        True,
        "",
    ),
}
_QUESTION = "<|image_1|>\nRepresent the given image with the following question: What is it, {i}?\n"
RAW |= {
    name: (_QUESTION, True, "answer {i}", False, "husky {i}")
    for name in ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "Visual7W")
}


@dataclass(frozen=True)
class Written:
    """What a written source holds: rows, and the indices of broken ones."""

    rows: int
    broken: tuple[int, ...]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(56, 28, seed).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_all(root: Path, good: int = 4) -> dict[str, Written]:
    """All 25 sources with `good` whole rows each, then the broken ones."""
    return {source.name: write(source, root, good) for source in MMEB_TRAIN}


def write(source: MMEBTrainSource, root: Path, good: int = 4) -> Written:
    writer = {"mmeb": _write_mmeb, "colpali": _write_pages, "visrag": _write_pages}.get(source.family, _write_video)
    return writer(source, root, good)


def _write_mmeb(source: MMEBTrainSource, root: Path, good: int) -> Written:
    """Broken: a missing image, an image cut off, an empty positive or query."""
    query, query_image, positive, positive_image, negative = RAW[source.name]
    folder = root / source.hub_id
    seed = 1000 * list(RAW).index(source.name)
    rows = []
    for i in range(good + 3):
        row = {
            "qry": query.format(i=i),
            "qry_image_path": f"images/{source.name}/Train/q_{i}.jpg" if query_image else "",
            "pos_text": positive.format(i=i),
            "pos_image_path": f"images/{source.name}/Train/p_{i}.jpg" if positive_image else "",
        }
        if negative is not None or source.name == "VisDial":
            row["neg_text"] = (negative or "").format(i=i)
            row["neg_image_path"] = f"images/{source.name}/Train/n_{i}.jpg" if source.name == "VisDial" else ""
        for number, column in enumerate(("qry_image_path", "pos_image_path", "neg_image_path")):
            if row.get(column):
                put(folder / row[column], jpeg(seed + 10 * i + number))
        rows.append(row)
    shown = "qry_image_path" if query_image else "pos_image_path"
    (folder / rows[good][shown]).unlink()
    cut = folder / rows[good + 1][shown]
    cut.write_bytes(cut.read_bytes()[:-60])
    side = "qry" if not query_image else "pos"  # a side that is text alone, if there is one
    rows[good + 2].update({"qry": ""} if side == "qry" else {"pos_text": "", "pos_image_path": ""})
    table = folder / source.name / "original-00000-of-00001.parquet"
    table.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(table))
    return Written(good + 3, (good, good + 1, good + 2))


def _write_pages(source: MMEBTrainSource, root: Path, good: int) -> Written:
    """Broken: an image cut off, no image, an empty query."""
    images: list = [{"bytes": jpeg(5000 + i), "path": f"{i}.jpg"} for i in range(good + 3)]
    images[good]["bytes"] = images[good]["bytes"][:-60]
    images[good + 1] = None
    queries = [f"what is on page {i}?" for i in range(good + 3)]
    queries[good + 2] = ""
    columns: dict = {"image": images, "query": queries}
    if source.family == "colpali":
        columns["image_filename"] = [f"{i}.jpg" for i in range(good + 3)]
        columns["answer"] = ["B", *(f"answer {i}" for i in range(1, good + 3))]
        columns["options"] = ["['A) red', 'B) blue']", *[""] * (good + 2)]
        columns["source"] = ["arxiv_qa", *["pdf"] * (good + 2)]
    else:
        columns["source"] = ["PlotQA", "unheard of", *["SlideVQA"] * (good + 1)]
    features = {name: Image() if name == "image" else Value("string") for name in columns}
    table = root / source.hub_id / "data" / "train-00000-of-00001.parquet"
    table.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=Features(features)).to_parquet(str(table))
    return Written(good + 3, (good, good + 1, good + 2))


def _write_video(source: MMEBTrainSource, root: Path, good: int) -> Written:
    """Broken: a missing folder, a frame cut off, a damaged line, an answer that is empty."""
    folder = root / source.hub_id
    lines = []
    for i in range(good + 4):
        name = f"{'qa' if source.family == 'video_qa' else 'v'}_{i}"
        ask = f"<video>\nWhat happens in clip {i}?" if source.family == "video_qa" else "<video>\nDescribe it."
        turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": f"A kite flies {i}. "}]
        lines.append(json.dumps({"id": name, "video": name, "conversations": turns}))
        for frame in range(10):
            put(folder / f"train_300k/{name}/c01_{frame + 1:04d}.jpeg", jpeg(9000 + 20 * i + frame))
    last = f"train_300k/{'qa' if source.family == 'video_qa' else 'v'}_"
    for frame in (folder / f"{last}{good}").iterdir():
        frame.unlink()
    cut = folder / f"{last}{good + 1}/c01_0001.jpeg"
    cut.write_bytes(cut.read_bytes()[:-60])
    lines[good + 2] = lines[good + 2][:40]
    lines[good + 3] = lines[good + 3].replace(f"A kite flies {good + 3}. ", "")
    put(folder / source.file, ("\n".join(lines) + "\n").encode())
    return Written(good + 4, tuple(range(good, good + 4)))
