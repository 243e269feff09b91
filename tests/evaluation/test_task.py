"""The mteb tasks: known scores for known models, storage, resuming, and real SentenceTransformers."""

from __future__ import annotations

import json
import math
import warnings
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
from mteb.models import SentenceTransformerEncoderWrapper

from evaluation.chance import chance_level
from evaluation.embedding.encoding import MediaFirstEncoder
from evaluation.embedding.fingerprint import UNSTAMPED, fingerprint, stamp
from evaluation.embedding.store import EmbeddingStore
from evaluation.mmeb_v2 import MMEB_V2
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.task import category_of, mmeb_task, mmeb_v2_benchmark, select_rows, standard_error

ROWS = {f"{row.group}/{row.name}": row for row in MMEB_V2}
FAMILIES = {row.family: row for row in reversed(MMEB_V2)}


def row_of(name):
    return next(row for row in MMEB_V2 if row.name == name)


def make_task(written, **kwargs):
    task = mmeb_task(written.row, DataRoot(written.root, offline=True), **kwargs)
    task.load_data()
    return task


def run(task, encoder):
    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


@pytest.mark.parametrize("name", ROWS)
def test_an_oracle_scores_one_on_every_data_set(name, write, oracle):
    task = make_task(write(ROWS[name]))
    scores = run(task, oracle(task.dataset["default"]["test"]))
    assert scores["main_score"] == 1.0
    assert 0 < scores["chance"] < 1
    assert scores["skipped_queries"] > 0 and scores["broken_rows"] >= scores["skipped_queries"]
    assert set(scores["per_query"].values()) == {1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_score_the_computed_chance_level(family, write, random_encoder):
    task = make_task(write(FAMILIES[family]))
    data = task.dataset["default"]["test"]
    values = [run(task, random_encoder(data, seed))["main_score"] for seed in range(20)]
    expected = chance_level(data, task.row.metric)
    # queries share candidates, so they vary together: the larger of both estimates
    independent = math.sqrt(expected * (1 - expected) / (len(values) * len(data["queries"])))
    error = max(np.std(values, ddof=1) / math.sqrt(len(values)), independent)
    assert 0 < error < 0.07
    assert abs(np.mean(values) - expected) < 3.5 * error


def test_a_constant_model_gains_nothing_from_the_order_of_the_candidates(write):
    """Upstream the positive is first in its list; equal scores must not turn that into hits."""
    task = make_task(write(row_of("CIRR")))
    data = task.dataset["default"]["test"]
    lists = data["top_ranked"]
    first = np.mean([listed[0] in data["relevant_docs"][query] for query, listed in lists.items()])
    assert first < 1
    assert all(listed == sorted(listed) for listed in lists.values())


def test_chance_level_by_hand():
    data = {
        "corpus": ["a", "b", "c", "d"],
        "queries": [],
        "relevant_docs": {"q": {"a": 2, "b": 1}},
        "top_ranked": None,
    }
    assert chance_level(data, "hit@1") == 0.5
    discounts = 1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)
    assert chance_level(data, "ndcg_linear@5") == pytest.approx(3 / 4 * discounts / (2 + 1 / math.log2(3)))
    with pytest.raises(ValueError, match="map"):
        chance_level(data, "map")


def test_an_answer_that_is_missing_from_the_candidates_counts_as_missed(write, oracle):
    written = write(row_of("MVBench"))
    file = next(written.root.rglob("json/action_count.json"))
    rows = json.loads(file.read_text())
    rows[0]["answer"] = "elsewhere"
    file.write_text(json.dumps(rows))
    task = make_task(written)
    scores = run(task, oracle(task.dataset["default"]["test"]))
    missed = [query for query, value in scores["per_query"].items() if value == 0]
    assert len(missed) == 1 and scores["main_score"] == pytest.approx(79 / 80)
    assert scores["oddities"] == {"rows whose answer is not among their candidates": 1}
    assert scores["protocol"] == "vlm2vec"


def test_mixed_grades_have_the_harness_number_beside_ours(write, oracle):
    """Page 1 has grade 3 and page 0 grade 1; sets of small whole numbers keep their order, so here both agree."""
    task = make_task(write(row_of("ViDoRe_esg_reports_human_labeled_v2")))
    scores = run(task, oracle(task.dataset["default"]["test"]))
    assert scores["main_score"] == scores["ndcg_official"] == 1
    flat = make_task(write(row_of("ViDoRe_docvqa"), 1))
    assert "ndcg_official" not in run(flat, oracle(flat.dataset["default"]["test"]))


def test_ndcg_gain_is_linear(write, oracle):
    """One query with grades 3 and 1, ranked the wrong way round: linear 0.7967, exponential would be 0.7098."""
    task = make_task(write(row_of("ViDoRe_esg_reports_human_labeled_v2")))
    data = task.dataset["default"]["test"]
    encoder = oracle(data)
    encoder.vectors["q0"] = 2 * _unit(data, "p0") + 1 * _unit(data, "p1")
    value = run(task, encoder)["per_query"]["q0"]
    swapped, ideal = 1 + 3 / math.log2(3), 3 + 1 / math.log2(3)
    assert value == pytest.approx(swapped / ideal, abs=1e-6)
    assert value != pytest.approx((1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3)), abs=1e-3)


def _unit(data, page):
    ids = list(data["corpus"]["id"])
    return np.eye(len(ids), dtype=np.float32)[ids.index(page)]


def test_categories_are_valid_and_describe_the_rows():
    assert category_of(row_of("MSCOCO_t2i")) == "t2it"
    assert category_of(row_of("MSCOCO_i2t")) == "it2t"
    assert category_of(row_of("CIRR")) == "it2it"
    assert category_of(row_of("K700")) == "vt2t"
    assert category_of(row_of("MSVD")) == "t2vt"
    assert category_of(row_of("QVHighlight")) == "vt2vt"
    assert category_of(row_of("ViDoRe_docvqa")) == "t2it"
    benchmark = mmeb_v2_benchmark("nowhere")
    assert len(benchmark.tasks) == 78 and benchmark.name == "MMEB-V2(vlm2vec, page-fixed)"
    assert len({task.metadata.name for task in benchmark.tasks}) == 78


def test_subsets_are_names_groups_subgroups_or_modalities():
    assert [row.name for row in select_rows(["MSCOCO", "OOD"])][0] == "MSCOCO"
    assert len(select_rows(["V-QA"])) == 5 and len(select_rows(["image", "I-VG"])) == 36
    with pytest.raises(ValueError, match=r"unknown subset \['mscoco'\]"):
        select_rows(["mscoco"])


def test_names_and_labels_keep_different_measurements_apart():
    row = row_of("ViDoSeek-page")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [
            mmeb_task(row, "x", **options).metadata.name
            for options in (
                {},
                {"page_split": "page"},
                {"protocol": "btoks"},
                {"fraction": 0.1},
                {"fraction": 0.1, "seed": 1},
            )
        ]
    assert names == [
        "MMEB-V2.vlm2vec.ViDoSeek-page-fixed",
        "MMEB-V2.vlm2vec.ViDoSeek-page",
        "MMEB-V2.btoks.ViDoSeek-page-fixed",
        "MMEB-V2.vlm2vec.ViDoSeek-page-fixed.fraction0.1-seed0",
        "MMEB-V2.vlm2vec.ViDoSeek-page-fixed.fraction0.1-seed1",
    ]
    with pytest.warns(UserWarning, match="an estimate"):
        assert "78 of 78, fraction 0.5" in mmeb_v2_benchmark("x", fraction=0.5).name
    with pytest.raises(ValueError, match="fraction"):
        mmeb_task(row, "x", fraction=0)


def test_standard_error_by_hand():
    assert standard_error([0, 1, 0, 1], 4) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert standard_error([0, 1, 0, 1], 8) == pytest.approx(math.sqrt(1 / 3) / 2 * math.sqrt(1 / 2))
    assert standard_error([1.0], 10) == 0.0


def evaluate(model, tasks, cache):
    return mteb.evaluate(model, tasks, cache=cache, co2_tracker=False, show_progress_bar=False).task_results


def test_sentence_transformers_see_media_before_text_and_no_absent_media(write, pixels):
    task = make_task(write(row_of("MomentSeeker")))
    evaluate(pixels, [task], None)
    calls = pixels[0].calls
    queries = [entry for entry in calls if isinstance(entry, str) or "clip." not in entry["text"]]
    assert {tuple(entry) if isinstance(entry, dict) else "str" for entry in queries} == {
        "str",
        ("image", "text"),
        ("video", "text"),
    }
    assert all(len(entry["video"]["array"]) == 5 for entry in calls if entry not in queries)


def test_shared_candidates_are_encoded_once(write, pixels):
    """Two data sets over the same pages: the second encodes only its queries."""
    first, second = row_of("ViDoSeek-page"), row_of("ViDoSeek-doc")
    written = [write(first), write(second)]
    benchmark = mmeb_v2_benchmark(DataRoot(written[0].root, offline=True), subset=[first.name, second.name])
    evaluate(pixels, benchmark, None)
    pages = [entry for entry in pixels[0].calls if isinstance(entry, dict)]
    assert len(pages) == 6, "six good pages, not twelve"


def test_identical_media_are_encoded_once_within_a_data_set(write, pixels):
    task = make_task(write(row_of("HMDB51")))
    evaluate(pixels, [task], None)
    videos = [entry for entry in pixels[0].calls if isinstance(entry, dict) and "video" in entry]
    assert len(videos) == 6
    evaluate(pixels, [task], None)
    assert len([e for e in pixels[0].calls if isinstance(e, dict) and "video" in e]) == 6


def test_results_belong_to_a_checkpoint_and_a_killed_run_continues(write, pixels, tmp_path):
    written = [write(row_of(name)) for name in ("HMDB51", "UCF101")]
    cache = mteb.ResultCache(tmp_path / "results")

    def tasks():
        return [make_task(w) for w in written]

    stamp(pixels, "test/pixels")
    evaluate(pixels, tasks()[:1], cache)
    pixels[0].calls.clear()
    evaluate(pixels, tasks()[:1], cache)
    assert not pixels[0].calls, "the stored result is used"
    evaluate(pixels, tasks(), cache)
    assert pixels[0].calls, "only the missing data set is run"
    stored = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("MMEB-V2.*.json"))
    assert len(stored) == 2 and {p.parts[-2] for p in stored} == {fingerprint(pixels)}

    with torch.no_grad():
        pixels[0].weight.mul_(2)
    stamp(pixels)
    pixels[0].calls.clear()
    evaluate(pixels, tasks()[:1], cache)
    assert pixels[0].calls, "a changed checkpoint never meets an old result"


def test_a_model_without_a_revision_gets_its_fingerprint_before_anything_is_stored(write, pixels, tmp_path):
    cache = mteb.ResultCache(tmp_path / "results")
    evaluate(pixels, [make_task(write(row_of("HMDB51")))], cache)
    folders = {path.parent.name for path in tmp_path.rglob("MMEB-V2.*.json")}
    assert folders == {fingerprint(pixels)} and UNSTAMPED not in folders


def test_a_remembered_fingerprint_notices_every_kind_of_write(pixels):
    seen = [fingerprint(pixels)]
    weight = pixels[0].weight
    with torch.no_grad():
        weight.mul_(2)
    seen.append(fingerprint(pixels))
    weight.data.mul_(2)  # not counted by torch
    seen.append(fingerprint(pixels))
    weight.data = weight.data * 2
    seen.append(fingerprint(pixels))
    assert len(set(seen)) == 4
    weight.data = weight.data / 8
    assert fingerprint(pixels) == seen[0]


def test_fingerprints_follow_weights_prompts_and_truncation_only(pixels):
    before = fingerprint(pixels)
    assert len(before) == 40 and fingerprint(pixels) == before
    pixels.prompts = {"query": "find: "}
    with_prompt = fingerprint(pixels)
    pixels.truncate_dim = 8
    assert len({before, with_prompt, fingerprint(pixels)}) == 3
    assert fingerprint(torch.nn.Linear(2, 2)) != fingerprint(torch.nn.Linear(2, 2))


def test_a_fraction_states_its_error(write, random_encoder):
    task = make_task(write(row_of("MVBench")), fraction=0.5, seed=1)
    scores = run(task, random_encoder(task.dataset["default"]["test"], 0))
    asked = scores["num_queries"] + scores["skipped_queries"]
    assert asked == 60 and scores["expected_queries"] == asked
    values = list(scores["per_query"].values())
    factor = math.sqrt(1 - 0.5)
    assert scores["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)) * factor)
    assert scores["fraction"] == 0.5 and scores["sample_seed"] == 1


def test_a_pinned_hub_revision_is_part_of_the_task_and_other_data_are_refused(write):
    written = write(row_of("HMDB51"))
    root = DataRoot(written.root, offline=True)
    task = mmeb_v2_benchmark(root, subset=["HMDB51"], revisions={"HMDB51": "abc"}).tasks[0]
    assert task.metadata.dataset["revision"] == "abc" and task.metadata.name == "MMEB-V2.vlm2vec.HMDB51.revision-abc"
    with pytest.raises(ValueError, match="pinned to revision abc"):
        task.load_data()
    with pytest.raises(ValueError, match=r"name \['CIRR'\], which are not among the 1"):
        mmeb_v2_benchmark(root, subset=["HMDB51"], revisions={"CIRR": "abc"})


def test_every_result_says_which_data_it_was_measured_on(write, random_encoder):
    task = make_task(write(row_of("HMDB51")))
    scores = run(task, random_encoder(task.dataset["default"]["test"], 0))
    assert list(scores["data_versions"]) == ["VLM2Vec/HMDB51"]
    assert scores["data_versions"]["VLM2Vec/HMDB51"].startswith("files ")
    assert {"ndcg_exponential_at_5", "f1_at_1", "map_official_at_10"} <= scores.keys()


def test_a_data_set_that_was_cut_short_continues_where_it_stopped(write, pixels, tmp_path):
    """Killed between two shards: what was encoded before is not encoded again, and the score is the same."""
    written = write(row_of("MSVD"))
    root = DataRoot(written.root, offline=True)

    def benchmark(folder):
        return mmeb_v2_benchmark(root, subset=["MSVD"], store=EmbeddingStore(folder))

    def score(folder):
        options = {"batch_size": 1}
        results = mteb.evaluate(pixels, benchmark(folder), cache=None, co2_tracker=False, encode_kwargs=options)
        return results.task_results[0].scores["test"][0]["per_query"]

    whole = score(tmp_path / "whole")
    total = len(pixels[0].calls)
    put, shards = EmbeddingStore.put, []

    def killed(self, space, vectors):
        if shards:
            raise KeyboardInterrupt
        put(self, space, vectors)
        shards.append(len(vectors))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingStore, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            score(tmp_path / "cut")
    pixels[0].calls.clear()
    assert score(tmp_path / "cut") == whole
    assert len(pixels[0].calls) == total - shards[0] and shards[0] > 0
    pixels[0].calls.clear()
    pixels.truncate_dim = 8
    cut = score(tmp_path / "cut")
    assert not pixels[0].calls, "every truncation is scored from one encoding"
    with torch.no_grad():
        pixels[0].weight.mul_(-1)
    assert score(tmp_path / "cut") is not cut and len(pixels[0].calls) == total, "another checkpoint shares nothing"


@pytest.mark.parametrize("size", [4, 48])
def test_a_truncation_from_the_store_is_the_models_own(write, pixels, size):
    task = make_task(write(row_of("HMDB51")))
    pixels.truncate_dim = size
    encoder = MediaFirstEncoder(SentenceTransformerEncoderWrapper(pixels), EmbeddingStore())
    queries = task.dataset["default"]["test"]["queries"]
    inputs = SimpleNamespace(dataset=queries)
    found = encoder.encode(inputs, task_metadata=task.metadata, hf_split="test", hf_subset="default")
    own = pixels.encode([{"video": row["video"].images(), "text": row["text"]} for row in queries])
    assert found.shape == (len(queries), size) and np.array_equal(found, own)
