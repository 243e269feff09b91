"""Small MMEB-V2 data sets written in the real layout, good rows and broken ones, and models with a known score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Features, Image, Value
from mteb.models import ModelMeta
from sentence_transformers import SentenceTransformer

from evaluation.mmeb_v2 import MMEBDataset
from evaluation.mmeb_v2.layouts import (
    MOMENT_FEATURES,
    caption_record,
    image_record,
    moment_record,
    picture,
    put,
    put_rows,
    put_table,
    question_record,
)


@pytest.fixture(autouse=True)
def offline_cache(tmp_path_factory, monkeypatch):
    """No network, and no file outside the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def put_video(folder: Path, seed: int, frames: int = 10) -> None:
    for i in range(frames):
        put(folder / f"frame_{i + 1:04d}.jpg", picture(1000 * seed + i, "JPEG"))


@dataclass(frozen=True)
class Written:
    """A data set on disk: the row adapted to its size, its root, the broken query rows and what else is reported."""

    row: MMEBDataset
    root: Path
    broken_queries: tuple[int, ...]
    queries: int


def rows_to_columns(rows: list[dict]) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_image(row: MMEBDataset, root: Path, layout: int) -> Written:
    """Four good rows; then: query image missing, query image or positive cut off, a blank or missing negative."""
    media = root / row.media_roots[layout % len(row.media_roots)]
    for i in range(7):
        put(media / f"q/{i}.jpg", picture(i, "JPEG"))
        put(media / f"c/{i}.png", picture(100 + i))
    (media / "q/4.jpg").unlink()
    put(media / "c/5.png", picture(105)[:60])
    rows = []
    for i in range(7):
        others = [(i + step) % 4 for step in (1, 2)]
        rows.append(image_record(row, i, [i, *others, others[0]]))  # the last one is a duplicate
    if row.family == "text":
        put(media / "q/5.jpg", picture(5, "JPEG")[:60])
        rows[6]["tgt_text"][1] = ""
    else:
        rows[6]["tgt_img_path"][1] = "c/none.png"
    if row.family == "image":  # no query image to lose: an empty candidate list instead
        rows[4]["tgt_text"], rows[4]["tgt_img_path"] = [], []
    put_rows(row, root, rows)
    return Written(replace(row, num_queries=7), root, (4, 5), 5)


def write_labels(row: MMEBDataset, root: Path, layout: int) -> Written:
    rows = [{"video_id": str(i), "pos_text": f"label_{i % 3}"} for i in range(6)]
    if row.family == "label_lists":
        rows = [{**r, "neg_text": ["label_0", "label_1", "label_2", "label_1"]} for r in rows]
    rows.append({**rows[0], "video_id": "none"})
    rows.append({**rows[0], "video_id": "cut"})
    media = root / row.media_roots[layout % len(row.media_roots)]
    if row.name == "K700":  # instead of the 700 official labels
        put(root / "labels/K700.txt", b"label_0\nlabel_1\nlabel_2\n")
    for i in range(6):
        put_video(media / str(i), i, 3 + i)
    put_video(media / "cut", 9)
    (media / "cut/frame_0001.jpg").write_bytes(picture(1, "JPEG")[:100])
    put_rows(row, root, rows)
    return Written(replace(row, num_queries=8, num_candidates=3), root, (6, 7), 6)


def write_questions(row: MMEBDataset, root: Path, layout: int) -> Written:
    options = ["red", "blue", "green", "blue", "grey"][: row.num_candidates or 3]
    rows = [question_record(row, i, options, i % 3 % len(options)) for i in range(6)]
    rows[5]["answer"] = {"videomme": "E", "nextqa": 7, "egoschema": "7", "activitynetqa": "maybe"}.get(
        row.family, rows[5]["answer"]
    )
    if row.family == "mvbench":  # a missing answer is no broken row there
        rows[5]["question"] = None
    rows[4]["question"] = "  "
    media = root / row.media_roots[layout % len(row.media_roots)]
    for i in range(6):
        for subset in row.subsets or ("",):
            values = {k: str(v) for k, v in rows[i].items()} | {"subset": subset}
            put_video(media / row.media_path.format(**values), i)
    put_rows(row, root, rows)
    parts = len(row.subsets) or 1
    broken = tuple(6 * part + i for part in range(parts) for i in (4, 5))
    return Written(replace(row, num_queries=6 * parts), root, broken, 4 * parts)


def write_captions(row: MMEBDataset, root: Path, layout: int) -> Written:
    """Rows 3 and 4 share a video; row 5 has no frames; row 6 has an empty caption."""
    names = ["v0", "v1", "v2", "v3", "v3", "v5", "v6"]
    captions = [f"caption {i}" for i in range(6)] + [""]
    rows = [caption_record(row, name, caption) for name, caption in zip(names, captions, strict=True)]
    media = root / row.media_roots[layout % len(row.media_roots)]
    for i, name in enumerate(names):
        if name != "v5":
            put_video(media / name, i)
    put_rows(row, root, rows)
    return Written(replace(row, num_queries=7), root, (5, 6), 5)


def write_clips(row: MMEBDataset, root: Path, layout: int) -> Written:
    """Row 2 has no positive clip, row 3 no folder, row 4 an empty negative."""
    media = root / row.media_roots[layout % len(row.media_roots)]
    for i in (0, 1, 2, 4):
        put_video(media / f"v{i}/query", i, 12)
        for j in range(3):
            put_video(media / f"v{i}" / (f"negative_{j}" if j or i == 2 else "positive"), 10 * i + j, 8)
    (media / "v4/negative_9").mkdir()
    rows = [{"query": f"scene {i}", "video_path": f"x/v{i}.mp4", "clips_dir_path": "x"} for i in range(5)]
    put_rows(row, root, rows)
    return Written(replace(row, num_queries=5, num_candidates=3), root, (2, 3), 3)


def write_moments(row: MMEBDataset, root: Path, layout: int) -> Written:
    media = root / row.media_roots[0]
    for i in range(6):
        for j in range(4):
            put_video(media / f"video_frames/movie_{i}_clip{j}", 10 * i + j, 5)
    put_video(media / "video_frames/movie_q", 99, 4)
    image = "query_images/a.jpg"
    put(media / (f"query_{image[len('query_') :]}" if layout == 0 else image), picture(3, "JPEG"))
    shown = ["", "images/a.jpg", "movie/q.mp4", "", "images/none.jpg", ""]
    rows = []
    for i in range(6):
        right = [f"movie/{i}/clip{j}.mp4" for j in range(1 + i % 2)]
        rows.append(moment_record(i, shown[i], right, [f"movie/{i}/clip{j}.mp4" for j in (2, 3)]))
    rows[5]["positive_frames"] = [{"output_path": "movie/none.mp4", "time": 0}]
    put_rows(row, root, rows, MOMENT_FEATURES)
    return Written(replace(row, num_queries=6), root, (4, 5), 4)


def write_visdoc(row: MMEBDataset, root: Path, layout: int) -> Written:
    """Page 4 is cut off; query 3 is empty; query 4 has only page 4; query 5 has no judgement."""
    number = "VisRAG" not in row.name
    ids = (lambda n: n) if number else (lambda n: f"page-{n}.png")
    kind = Value("int64") if number else Value("string")
    place = (root / row.hub_id, root / row.annotation)[layout]
    pages = [{"bytes": picture(i), "path": None} for i in range(7)]
    pages[4]["bytes"] = pages[4]["bytes"][:50]
    file = f"{row.split}-00000-of-00001.parquet"
    put_table(
        place / "corpus" / file,
        {"corpus-id": [ids(i) for i in range(7)], "image": pages},
        Features({"corpus-id": kind, "image": Image()}),
    )
    queries = {"query-id": [ids(i) for i in range(6)], "query": ["a", "b", "c", "", "e", "f"]}
    put_table(place / "queries" / file, queries)
    grade = 3 if row.graded else 1
    judged = [(0, 0, 1), (0, 1, grade), (1, 2, 1), (1, 2, grade), (2, 3, 1), (2, 5, 0), (3, 0, 1), (4, 4, 1)]
    put_table(
        place / "qrels" / file,
        {
            "query-id": [ids(q) for q, _, _ in judged],
            "corpus-id": [ids(p) for _, p, _ in judged],
            "score": [s for _, _, s in judged],
        },
    )
    return Written(replace(row, num_queries=6, num_candidates=7), root, (3, 4, 5), 3)


WRITERS = {
    **dict.fromkeys(("text", "image", "captioned"), write_image),
    **dict.fromkeys(("labels", "label_lists"), write_labels),
    **dict.fromkeys(("mvbench", "videomme", "nextqa", "egoschema", "activitynetqa"), write_questions),
    "captions": write_captions,
    "clips": write_clips,
    "moments": write_moments,
    "beir": write_visdoc,
}


@pytest.fixture
def write(tmp_path):
    """write(row, layout=0) -> Written; the layout chooses between the official and the authors' media folders."""
    return lambda row, layout=0: WRITERS[row.family](row, tmp_path / f"layout{layout}", layout)


class TableEncoder:
    """mteb encoder that looks vectors up by row id; `seen` collects the batches it was given."""

    def __init__(self, vectors: dict[str, np.ndarray], name: str = "test/table", revision: str = "0") -> None:
        self.vectors, self.seen = vectors, []
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": name, "revision": revision, "modalities": ["text", "image", "video"]}
        )

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        rows = list(inputs.dataset)
        self.seen += rows
        return torch.from_numpy(np.stack([self.vectors[row["id"]] for row in rows]))

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)


@pytest.fixture
def oracle():
    """oracle(data) -> encoder whose similarity is the relevance grade."""

    def build(data) -> TableEncoder:
        ids = list(data["corpus"]["id"])
        vectors = {doc: unit for doc, unit in zip(ids, np.eye(len(ids), dtype=np.float32), strict=True)}
        for query, grades in data["relevant_docs"].items():
            found = [grade * vectors[doc] for doc, grade in grades.items() if doc in vectors]
            vectors[query] = sum(found) if found else np.zeros(len(ids), np.float32)
        return TableEncoder(vectors)

    return build


@pytest.fixture
def random_encoder():
    """random_encoder(data, seed) -> encoder with Gaussian vectors."""

    def build(data, seed: int) -> TableEncoder:
        rng = np.random.default_rng(seed)
        ids = [*data["corpus"]["id"], *data["queries"]["id"]]
        return TableEncoder({i: rng.normal(size=16).astype(np.float32) for i in ids})

    return build


class Pixels(torch.nn.Module):
    """A SentenceTransformer module over pictures, videos and texts, with one weight; `calls` counts inputs."""

    modalities = ["text", "image", "video", "message", ("image", "text"), ("text", "video")]

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls: list = []

    def preprocess(self, inputs, prompt=None, **kwargs):
        self.calls += inputs
        return {"features": torch.stack([self._vector(entry) for entry in inputs])}

    def _vector(self, entry):
        entry = {"text": entry} if isinstance(entry, str) else entry
        video = entry.get("video", ())
        video = video["array"] if isinstance(video, dict) else video
        frames = [*video, *([entry["image"]] if "image" in entry else [])]
        image = sum(
            (torch.from_numpy(np.asarray(f.resize((4, 4)), np.float32)).flatten() for f in frames), torch.zeros(48)
        )
        text = torch.zeros(48)
        for position, char in enumerate(entry.get("text", "")):
            text[(ord(char) * 7 + position) % 48] += 1
        return image / 255 + 0.1 * text

    def forward(self, features, **kwargs):
        return {**features, "sentence_embedding": features["features"] * self.weight}

    def get_sentence_embedding_dimension(self):
        return 48

    def get_embedding_dimension(self):
        return 48

    def tokenize(self, inputs, **kwargs):
        return self.preprocess(inputs)

    def save(self, *args, **kwargs):
        raise NotImplementedError


@pytest.fixture
def pixels():
    return SentenceTransformer(modules=[Pixels()], device="cpu")
