"""Tools that people embed with take the plain checkpoint and give equal vectors: `python -m tests.engines.tools_job`.

Runs in an environment with the tools beside what this package needs (`make tools`). Each tool gets a saved model's
path and nothing of this package, and its vectors are compared with `SentenceTransformer(path).encode`: of three texts
and, where the tool takes images, of two pictures. Most take those as paths, which sentence-transformers opens.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from st_btok import build_model
from tests.backbones import picture
from tests.engines.table import ROOT, Row, add

BOUND = 1e-5
TEXTS = ["Which of the two towns lies by the sea?", "a red kite", "東京の夜"]
CPU = {"device": "cpu"}
WRONG = "txtai, default"


def langchain(path: str, model: SentenceTransformer, pictures: list[str]) -> np.ndarray:
    from langchain_huggingface import HuggingFaceEmbeddings

    return HuggingFaceEmbeddings(model_name=path, model_kwargs=CPU).embed_documents([*TEXTS, *pictures])


def llama_index(path: str, model: SentenceTransformer, pictures: list[str]) -> np.ndarray:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    embedder = HuggingFaceEmbedding(model_name=path, device="cpu")
    return [*embedder.get_text_embedding_batch(TEXTS), *embedder.get_image_embedding_batch(pictures)]


def haystack(path: str, model: SentenceTransformer, pictures: list[str]) -> np.ndarray:
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.embedders import sentence_transformers as embedders

    found = []
    texts = [Document(content=text) for text in TEXTS]
    images = [Document(content="", meta={"file_path": path}) for path in pictures]
    for kind, documents in (
        (embedders.SentenceTransformersDocumentEmbedder, texts),
        (embedders.SentenceTransformersDocumentImageEmbedder, images),
    ):
        embedder = kind(model=path, device=ComponentDevice.from_str("cpu"))
        embedder.warm_up()
        found += [document.embedding for document in embedder.run(documents)["documents"]]
    return found


def chroma(path: str, model: SentenceTransformer, pictures: list[str]) -> np.ndarray:
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    return SentenceTransformerEmbeddingFunction(model_name=path, device="cpu")([*TEXTS, *pictures])


def lancedb(path: str, model: SentenceTransformer, pictures: list[str]) -> np.ndarray:
    from lancedb.embeddings import get_registry

    embedder = get_registry().get("sentence-transformers").create(name=path, device="cpu")
    return embedder.generate_embeddings([*TEXTS, *pictures])


def qdrant(path: str, model: SentenceTransformer) -> np.ndarray:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    size = model.get_embedding_dimension()
    client.create_collection("t", models.VectorParams(size=size, distance=models.Distance.COSINE))
    points = [models.PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(model.encode(TEXTS))]
    client.upsert("t", points)
    return [record.vector for record in client.retrieve("t", list(range(len(TEXTS))), with_vectors=True)]


def bertopic(path: str, model: SentenceTransformer) -> np.ndarray:
    from bertopic.backend._sentencetransformers import SentenceTransformerBackend

    return SentenceTransformerBackend(model).embed(TEXTS)


def setfit(path: str, model: SentenceTransformer) -> np.ndarray:
    from setfit import SetFitModel

    return SetFitModel.from_pretrained(path, device="cpu").encode(TEXTS)


def keybert(path: str, model: SentenceTransformer) -> np.ndarray:
    from keybert import KeyBERT

    return KeyBERT(model=model).model.embed(TEXTS)


def txtai(path: str, model: SentenceTransformer) -> np.ndarray:
    from txtai.vectors import VectorsFactory

    settings = {"path": path, "method": "sentence-transformers", "gpu": False}
    return VectorsFactory.create(settings, None).encode(TEXTS)


def txtai_default(path: str, model: SentenceTransformer) -> np.ndarray:
    from txtai.vectors import VectorsFactory

    found = np.asarray(VectorsFactory.create({"path": path, "gpu": False}, None).encode(TEXTS), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


# Tools that take images too, by the name in the table: package on the registry, how it is used, and the function.
WITH_IMAGES: dict[str, tuple[str, str, Callable]] = {
    "Chroma": ("chromadb", "`SentenceTransformerEmbeddingFunction(path)`", chroma),
    "Haystack": ("haystack-ai", "`SentenceTransformersDocumentEmbedder(path)`, `...ImageEmbedder(path)`", haystack),
    "LanceDB": ("lancedb", "registry `sentence-transformers`, `name=path`", lancedb),
    "LangChain": ("langchain-huggingface", "`HuggingFaceEmbeddings(path)`", langchain),
    "LlamaIndex": ("llama-index-embeddings-huggingface", "`HuggingFaceEmbedding(path)`", llama_index),
}
TEXT_ONLY: dict[str, tuple[str, str, Callable]] = {
    "BERTopic": ("bertopic", "`SentenceTransformerBackend(model)`", bertopic),
    "KeyBERT": ("keybert", "`KeyBERT(model)`", keybert),
    "Qdrant": ("qdrant-client", "vectors of `encode`, stored and read back (local)", qdrant),
    "SetFit": ("setfit", "`SetFitModel.from_pretrained(path)`", setfit),
    "txtai": ("txtai", '`method="sentence-transformers"`', txtai),
    WRONG: ("txtai", "`path` alone: it pools `AutoModel` by itself", txtai_default),
}


def draw_pictures(folder: Path) -> list[str]:
    """Two files of coloured noise."""
    paths = [str(folder / f"{number}.png") for number in range(2)]
    for number, path in enumerate(paths):
        picture(84, 56, number).save(path)
    return paths


def difference(tool: Callable, path: str, pictures: list[str]) -> float:
    """Largest difference of an entry, NaN where the shapes differ; of texts alone without pictures."""
    model = SentenceTransformer(path, device="cpu")
    expected = model.encode(TEXTS)
    if pictures:
        images = [Image.open(file).convert("RGB") for file in pictures]
        expected = np.concatenate([expected, model.encode(images)])
    found = np.asarray(tool(path, model, pictures) if pictures else tool(path, model), np.float32)
    return float(np.abs(found - expected).max()) if found.shape == expected.shape else float("nan")


def main() -> None:
    """Every tool with both readouts; fails if one of them gives other vectors."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for readout in ("mean", "last"):
            backbone = str(ROOT / "recipes" / "backbone")
            built = build_model(backbone, readout=readout, model_kwargs={"dtype": torch.float32}, device="cpu")
            built.save_pretrained(str(Path(folder) / readout))
        pictures = draw_pictures(Path(folder))
        entries = [(name, *rest, pictures) for name, rest in WITH_IMAGES.items()]
        entries += [(name, *rest, []) for name, rest in TEXT_ONLY.items()]
        for name, package, form, tool, images in entries:
            for readout in ("mean", "last"):
                try:
                    found = difference(tool, str(Path(folder) / readout), images)
                    result = f"{found:.1e}" if found <= BOUND else f"**wrong, no error**: {found:.2f}"
                except Exception as error:
                    traceback.print_exc()
                    found, result = float("nan"), f"{type(error).__name__}: {str(error)[:80]}"
                form_and_inputs = f"{form}: {'texts, images' if images else 'texts'}"
                add([Row("tools", name, version(package), readout, form_and_inputs, result)])
                print(f"{name:<16}{readout:<6}{result}", flush=True)
                if name != WRONG and not found <= BOUND:
                    failed.append(f"{name} {readout}")
    if failed:
        sys.exit(f"other vectors: {', '.join(failed)}")


if __name__ == "__main__":
    main()
