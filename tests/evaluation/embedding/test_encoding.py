"""Models with many vectors per input on our own suites: MaxSim by hand, prompts, results, what is refused."""

from __future__ import annotations

import json
import shutil

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.types import PromptType
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch.utils.data import DataLoader

from evaluation.atomic_write import read_json
from evaluation.baselines import load_model
from evaluation.embedding.fingerprint import fingerprint
from evaluation.finite import NonFiniteError
from evaluation.mmeb_v2 import MMEB_V2
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.report import RUN_FILE
from evaluation.run import main
from evaluation.task import mmeb_task
from evaluation.wrapping import wrap
from tests.backbones import build, picture

ROWS = {row.name: row for row in MMEB_V2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved MultiVectorEncoder in ColQwen's form: the projected tokens of a tiny Qwen2-VL, of length 1."""
    torch.manual_seed(0)
    backbone, processor = build("qwen2_vl")
    place = tmp_path_factory.mktemp("multi_vector")
    backbone.save_pretrained(place / "backbone")
    processor.save_pretrained(place / "backbone")
    transformer = Transformer(str(place / "backbone"))
    modules = [
        transformer,
        Dense(transformer.get_embedding_dimension(), 8, module_input_name="token_embeddings"),
        MultiVectorMask(),
        Normalize(module_input_name="token_embeddings"),
    ]
    prompts = {"query": "[Q] ", "document": "[D] "}
    MultiVectorEncoder(modules=modules, device="cpu", prompts=prompts).save_pretrained(str(place / "model"))
    return place / "model"


def score(folder, root, out, *names, more=()):
    words = ["--model", str(folder), "--suite", "mmeb-v2", "--data", str(root), "--offline", "--subset", *names]
    main([*words, "--device", "cpu", "--output_dir", str(out), *more])


def maxsim(query, document):
    """Of every query vector the best of a document's, summed."""
    total = 0.0
    for vector in query:
        total += max(float(np.dot(vector, other)) for other in document)
    return total


def shown(record):
    """A row as a model has to see it, from the table alone."""
    text = record.get("body") or record.get("text") or ""
    image = record.get("image")
    return text if image is None else {"image": image.convert("RGB"), **({"text": text} if text.strip() else {})}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["GQA", "ViDoRe_docvqa"])
def test_scores_are_maxsim_by_hand(name, keep, write, folder, tmp_path):
    """GQA lists candidates for every query, ViDoRe searches all pages; with the model's own prompts and without."""
    written = write(ROWS[name])
    more = ["--sheets", "--report", *(["--model_prompts"] if keep else [])]
    score(folder, written.root, tmp_path / "out", name, more=more)
    (file,) = (tmp_path / "out/predictions").rglob("*.json")
    found = json.loads(file.read_text())["default"]["test"]

    task = mmeb_task(written.row, DataRoot(written.root, offline=True))
    task.load_data()
    data = task.dataset["default"]["test"]
    model = MultiVectorEncoder(str(folder), device="cpu")
    # labels have no instruction of the task's own, so the model's prompt stays before them in any case
    asked, answered = ("[Q] ", "[D] ") if keep else ("", "[D] " if name == "GQA" else "")
    queries, corpus = data["queries"], data["corpus"]
    told = [model.encode_query(shown(row), prompt=asked).numpy() for row in queries]
    pool = {row["id"]: model.encode_document(shown(row), prompt=answered).numpy() for row in corpus}
    assert len({len(vectors) for vectors in told + list(pool.values())}) > 1, "rows differ in the number of vectors"
    hits = {}
    for query, vectors in zip(queries["id"], told, strict=True):
        listed = data["top_ranked"][query] if data["top_ranked"] else list(pool)
        expected = {candidate: maxsim(vectors, pool[candidate]) for candidate in listed}
        assert found[query] == pytest.approx(expected, abs=1e-4)
        assert np.ptp(list(expected.values())) > 1e-3, "candidates differ"
        hits[query] = float(max(expected, key=expected.__getitem__) in data["relevant_docs"][query])

    (result,) = (path for path in (tmp_path / "out").rglob("MMEB-V2.*.json") if "predictions" not in path.parts)
    entry = json.loads(result.read_text())["scores"]["test"][0]
    assert fingerprint(model) in result.parts, "stored under the checkpoint"
    if written.row.metric == "hit@1":
        assert entry["per_query"] == hits
    assert entry["prompts"]["query"]["shown"] == ("both" if keep else "task")
    assert (tmp_path / "out/report/report.md").is_file()


def test_videos_are_taken_and_a_second_run_meets_the_result(write, folder, tmp_path, monkeypatch, capsys):
    written = write(ROWS["MSVD"])
    score(folder, written.root, tmp_path / "out", "MSVD")
    first = capsys.readouterr().out
    monkeypatch.setattr(MultiVectorEncoder, "encode_document", lambda *a, **k: pytest.fail("encoded again"))
    score(folder, written.root, tmp_path / "out", "MSVD")
    assert capsys.readouterr().out == first and "MSVD" in first


def test_vectors_that_are_not_finite_are_named(write, folder, tmp_path, monkeypatch):
    encode = MultiVectorEncoder.encode_query

    def broken(self, inputs, **kwargs):
        vectors = encode(self, inputs, **kwargs)
        vectors[2] = vectors[2].clone()
        vectors[2][0, :3] = torch.nan
        return vectors

    monkeypatch.setattr(MultiVectorEncoder, "encode_query", broken)
    written = write(ROWS["GQA"])
    with pytest.raises(SystemExit, match="have no score: GQA"):
        score(folder, written.root, tmp_path / "out", "GQA")
    assert "of row 'q2', 3 of " in read_json(tmp_path / "out" / RUN_FILE)[-1]["missing"]["GQA"]


def test_the_kind_is_read_from_the_checkpoint_and_truncation_is_refused(write, folder, tmp_path):
    model = load_model(str(folder), device="cpu")
    assert isinstance(model, MultiVectorEncoder)
    assert model.encode_document([{"image": picture(), "text": "a"}])[0].shape[1] == 8
    pylate = tmp_path / "pylate"
    shutil.copytree(folder, pylate)
    config = json.loads((pylate / "config_sentence_transformers.json").read_text())
    (pylate / "config_sentence_transformers.json").write_text(json.dumps({**config, "model_type": "ColBERT"}))
    loaded = load_model(str(pylate), device="cpu")
    assert isinstance(loaded, MultiVectorEncoder)
    assert torch.allclose(loaded.encode_query(["a"])[0], model.encode_query(["a"])[0], atol=1e-6)
    with pytest.raises(SystemExit, match="--truncate_dims .* one vector per input"):
        score(folder, write(ROWS["GQA"]).root, tmp_path / "out", "GQA", more=["--truncate_dims", "4"])


def test_mtebs_own_picture_retrieval_runs_wrapped(folder, monkeypatch):
    tasks = [task for task in mteb.mocks.ALL_MOCK_TASK_TEST_GRID if task.metadata.type == "Any2AnyRetrieval"]
    task = next(task for task in tasks if set(task.metadata.modalities) == {"image", "text"})
    model = MultiVectorEncoder(str(folder), device="cpu")
    wrapper = wrap(model, "test/multi")
    assert wrapper.mteb_model_meta.modalities == ["text", "image", "video"]
    assert wrapper.mteb_model_meta.revision == fingerprint(model)
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    assert mteb.evaluate(wrapper, task, **options).task_results
    model[1].linear.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="of the embedding of row .* numbers are NaN"):
        mteb.evaluate(wrapper, task, **options)


def test_wrapped_media_stand_before_the_text(folder):
    """mteb gives the columns as the table has them; the vectors are those of the picture first."""
    model = MultiVectorEncoder(str(folder), device="cpu")
    rows = Dataset.from_list([{"text": "a cat", "image": picture(seed=seed)} for seed in (1, 2)])
    loader = DataLoader(rows, batch_size=2, collate_fn=lambda batch: {k: [row[k] for row in batch] for k in batch[0]})
    task = mmeb_task(ROWS["GQA"], "nowhere").metadata
    options = {"task_metadata": task, "hf_split": "test", "hf_subset": "default", "show_progress_bar": False}
    found = wrap(model)._encode(loader, prompt_type=PromptType.document, **options)
    first = model.encode_document([{"image": picture(seed=seed), "text": "a cat"} for seed in (1, 2)])
    last = model.encode_document([{"text": "a cat", "image": picture(seed=seed)} for seed in (1, 2)])
    for got, expected, other in zip(found, first, last, strict=True):
        assert torch.allclose(got, expected, atol=1e-5) and not torch.allclose(got, other, atol=1e-3)
