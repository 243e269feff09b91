"""Synthetic copies of the 78 data sets in the layout of the real ones: their columns, folders and names, tiny media.

The tests write a few rows and break some of them; `evaluation.dry_run` writes as many rows as the real sets have.
Media are one small picture each, made different by bytes behind its end, which decoders ignore: thousands of distinct
files cost no encoding.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from evaluation.dataset import MMEBDataset

FRAMES = 8
"""Stored frames of a synthetic video: as many as are shown (the real ones have up to 64)."""
LISTED = {
    "N24News": 24, "HatefulMemes": 2, "VOC2007": 20, "SUN397": 397, "Place365": 365, "ObjectNet": 313,
    "Country211": 211,
}  # fmt: skip
"""Candidates of a query where an image data set has other than 1,000: the sizes of its label sets."""
PAGES = {"ViDoSeek-page": 5349, "MMLongBench-page": 6492}
"""Pages of the two sets whose size no source states: those of their `-doc` twins."""
Record = dict[str, Any]


def picture(seed: int, form: str = "PNG", size: tuple[int, int] = (30, 28)) -> bytes:
    """Noise, encoded.

    Args:
        seed: Seed of the noise.
        form: `PNG` or `JPEG`.
        size: Height and width; below 28 pixels a side the loaders enlarge a picture.

    Returns:
        The file's bytes.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def put(path: Path, data: bytes) -> None:
    """Write a file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def put_table(path: Path, columns: Mapping[str, Sequence[Any]], features: Features | None = None) -> None:
    """Write a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(dict(columns), features=features).to_parquet(str(path))


def put_rows(row: MMEBDataset, root: Path, rows: Sequence[Record], features: Features | None = None) -> None:
    """Write a data set's annotation rows where the loaders look for them.

    Args:
        row: The data set: its annotation file if it has one, else its hub repository, else one file a subset.
        root: The data root.
        rows: The rows; those of a data set with subsets stand in each of them.
        features: Their types, where they can't be guessed.
    """
    if row.annotation:
        put(root / row.annotation, "\n".join(map(json.dumps, rows)).encode())
    elif row.subsets:
        for subset in row.subsets:
            put(root / row.hub_id / f"json/{subset}.json", json.dumps(rows).encode())
    else:
        columns = {name: [record[name] for record in rows] for name in rows[0]}
        file = f"{row.split}-00000-of-00001.parquet"
        put_table(root / row.hub_id.split("/")[1] / (row.config or "data") / file, columns, features)


def image_record(row: MMEBDataset, index: int, listed: Sequence[int]) -> Record:
    """A row of an image data set: instructions as the hub has them, with the image's token."""
    shows_image = row.family != "image" or row.name in ("WebQA", "EDIS")  # those two name one that they don't have
    captioned = "{tgt_text}" in row.candidate_text
    return {
        "qry_inst": ("<|image_1|>\n" if shows_image else "") + _instruction(row.query_text, "qry_text"),
        "qry_text": f"body {index}" if "{qry_text}" in row.query_text else "",
        "qry_img_path": f"q/{index}.jpg" if row.family != "image" else "",
        "tgt_inst": "<|image_1|>\n" + _instruction(row.candidate_text, "tgt_text"),
        "tgt_text": [f"caption {number}" if captioned else "" for number in listed],
        "tgt_img_path": [f"c/{number}.png" if row.family != "text" else "" for number in listed],
    }


def _instruction(template: str, column: str) -> str:
    return template.replace(f" {{{column}}}", "").rstrip("\n")


def question_record(row: MMEBDataset, index: int, options: Sequence[str], right: int) -> Record:
    """A row of a video question answering data set."""
    lettered = [f"{'ABCDE'[place]}. {option}." for place, option in enumerate(options)]
    columns: dict[str, Record] = {
        "mvbench": {"video": f"{index}.mp4", "candidates": list(options), "answer": options[right]},
        "videomme": {"videoID": str(index), "options": lettered, "answer": "ABCDE"[right]},
        "nextqa": {"video": index, "answer": right, **{f"a{i}": option for i, option in enumerate(options)}},
        "egoschema": {"video_idx": str(index), "option": lettered, "answer": str(right)},
        "activitynetqa": {"video_name": str(index), "answer": ("yes", "no")[right % 2]},
    }
    return {**columns[row.family], "question": f"what is {index}?"}


def caption_record(row: MMEBDataset, video: str, caption: str) -> Record:
    """A row of a video retrieval data set, with the columns of all five."""
    return {
        "video": f"folder/{video}.mp4",
        "video_id": video,
        "videoID": video,
        "id": video,
        "sentence": caption,
        "caption": [caption, "other"] if "caption[0]" in row.query_text else caption,
        "enCap": [caption],
    }


_CLIP = {"output_path": Value("string"), "time": Value("int64")}
MOMENT_FEATURES = Features(
    query=Value("string"), input_frames=Value("string"), positive_frames=List(_CLIP), negative_frames=List(_CLIP)
)


def moment_record(index: int, shown: str, positive: Sequence[str], negative: Sequence[str]) -> Record:
    """A row of MomentSeeker; `shown` is the query's image or clip, empty for none."""
    return {
        "query": f"what {index}",
        "input_frames": shown,
        "positive_frames": [{"output_path": path, "time": 0} for path in positive],
        "negative_frames": [{"output_path": path, "time": 0} for path in negative],
    }


class FullSize:
    """Writes one data set with as many good rows as the real one has, times a fraction.

    Args:
        row: The data set.
        root: The data root.
        fraction: Part of the rows, and of what each ranks, in (0, 1].
    """

    def __init__(self, row: MMEBDataset, root: Path, fraction: float) -> None:
        self.row, self.root, self.fraction = row, root, fraction
        self.count = self._part(row.num_queries)
        self._media = root / (row.media_roots[0] if row.media_roots else "")
        self._jpeg, self._png = picture(0, "JPEG"), picture(1)
        self._written = 0

    def write(self) -> MMEBDataset:
        """Write it.

        Returns:
            The row, with the counts that were written.
        """
        families = {
            **dict.fromkeys(("text", "image", "captioned"), self._images),
            **dict.fromkeys(("labels", "label_lists"), self._labels),
            **dict.fromkeys(("mvbench", "videomme", "nextqa", "egoschema", "activitynetqa"), self._questions),
            "captions": self._captions,
            "clips": self._clips,
            "moments": self._moments,
            "beir": self._pages,
        }
        families[self.row.family]()
        written = replace(self.row, num_queries=self.count)
        if self.row.family == "beir" and self.row.num_candidates:
            return replace(written, num_candidates=self._part(self.row.num_candidates))
        return written

    def _part(self, number: int) -> int:
        return max(2, round(number * self.fraction))

    def _distinct(self, data: bytes) -> bytes:
        self._written += 1
        return data + self._written.to_bytes(4, "big")

    def _video(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for frame in range(FRAMES):
            (folder / f"frame_{frame + 1:04d}.jpg").write_bytes(self._distinct(self._jpeg))

    def _images(self) -> None:
        listed = self._part(LISTED.get(self.row.name, 1000))
        labels = self.row.group == "I-CLS"
        pool = listed if labels else max(self.count, 5 * listed)  # lists overlap, as the real ones do
        for folder, number, data in (("q", self.count, self._jpeg), ("c", pool, self._png)):
            (self._media / folder).mkdir(parents=True, exist_ok=True)
            shown = self.row.family != "image" if folder == "q" else self.row.family != "text"
            for index in range(number if shown else 0):
                file = self._media / folder / f"{index}.{'jpg' if folder == 'q' else 'png'}"
                file.write_bytes(self._distinct(data))
        rows = []
        for index in range(self.count):
            rows.append(image_record(self.row, index, [(index + step) % pool for step in range(listed)]))
        put_rows(self.row, self.root, rows)

    def _labels(self) -> None:
        labels = [f"label {number}" for number in range(self.row.num_candidates or 2)]
        rows = []
        for index in range(self.count):
            record: Record = {"video_id": str(index), "pos_text": labels[index % len(labels)]}
            rows.append(record | ({"neg_text": labels} if self.row.family == "label_lists" else {}))
            self._video(self._media / str(index))
        put(self.root / f"labels/{self.row.name}.txt", "\n".join(labels).encode())
        put_rows(self.row, self.root, rows)

    def _questions(self) -> None:
        subsets = self.row.subsets or ("",)
        self.count = max(1, self.count // len(subsets)) * len(subsets)
        number = 2 if self.row.family == "activitynetqa" else self.row.num_candidates or 4
        rows = []
        for index in range(self.count // len(subsets)):
            options = [f"option {index % 97} {place}" for place in range(number)]
            rows.append(question_record(self.row, index, options, index % number))
            for subset in subsets:
                fields = {key: str(value) for key, value in rows[-1].items()} | {"subset": subset}
                self._video(self._media / self.row.media_path.format(**fields))
        put_rows(self.row, self.root, rows)

    def _captions(self) -> None:
        rows = [caption_record(self.row, f"v{index}", f"caption {index}") for index in range(self.count)]
        for index in range(self.count):
            self._video(self._media / f"v{index}")
        put_rows(self.row, self.root, rows)

    def _clips(self) -> None:
        rows = []
        for index in range(self.count):
            rows.append({"query": f"scene {index}", "video_path": f"x/v{index}.mp4", "clips_dir_path": f"x/v{index}"})
            for name in ("query", "positive", *(f"negative_{number}" for number in range(9))):
                self._video(self._media / f"v{index}" / name)
        put_rows(self.row, self.root, rows)

    def _moments(self) -> None:
        rows = []
        for index in range(self.count):
            clips = [f"movie/{index}/clip{number}.mp4" for number in range(10)]
            for clip in clips:
                self._video(self._media / "video_frames" / clip.replace("/", "_").removesuffix(".mp4"))
            rows.append(moment_record(index, "", clips[:1], clips[1:]))
        put_rows(self.row, self.root, rows, MOMENT_FEATURES)

    def _pages(self) -> None:
        pages = self._part(self.row.num_candidates or PAGES.get(self.row.name, 1000))
        images = [{"bytes": self._distinct(self._jpeg), "path": None} for _ in range(pages)]
        queries, asked = list(range(self.count)), [query % pages for query in range(self.count)]
        tables: dict[str, tuple[Record, Features | None]] = {
            "corpus": (
                {"corpus-id": list(range(pages)), "image": images},
                Features({"corpus-id": Value("int64"), "image": Image()}),
            ),
            "queries": ({"query-id": queries, "query": [f"query {number}" for number in queries]}, None),
            "qrels": ({"query-id": queries, "corpus-id": asked, "score": [1] * self.count}, None),
        }
        for config, (columns, features) in tables.items():
            file = self.root / self.row.annotation / config / f"{self.row.split}-00000-of-00001.parquet"
            put_table(file, columns, features)
