"""Averages, intervals and comparisons, against published figures and hand calculations."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation.mmeb_v2 import MMEB_V2
from evaluation.reporting.leaderboard import leaderboard_entry
from evaluation.reporting.scores import (
    ModelScores,
    Score,
    paired_bootstrap,
    read_results,
    summarize,
)

# VLM2Vec-V2.0-Qwen2VL-2B as published (github TIGER-AI-Lab/VLM2Vec, experiments/public/all_scores, 2025-06-28):
# hit@1 and linear nDCG@5 of every data set, in the leaderboard's order, on the broken `page` split
PUBLISHED = """
0.808 0.729 0.563 0.85 0.71 0.359 0.474 0.893 0.652 0.252
0.515 0.436 0.901 0.588 0.474 0.529 0.382 0.433 0.649 0.722
0.827 0.575 0.745 0.782 0.753 0.714 0.686 0.906 0.195 0.669 0.643 0.841
0.671 0.871 0.858 0.692
0.38 0.428 0.409 0.6 0.14780600461893764
0.337 0.30703703703703705 0.20924801494628678 0.34 0.523
0.30378486055776893 0.283 0.48059701492537316 0.26462706565430993 0.10632274300094369
0.4939981532779317 0.20220082530949107 0.4083333333333333
0.8057573987022552 0.4484886950768515 0.836933803347616 0.8920767921191974 0.4382195288905396 0.608217112664813
0.8852555261521673 0.8650828475372231 0.8501367970825706 0.9217065065186136
0.4555552886561195 0.4426897295015239 0.42995014841633666 0.466179429204456
0.7687028213602233 0.8441010759070336 0.717924714040525 0.9150078016078801 0.8565495992280632 0.6604877574932249
0.21944808482459283 0.8018406693375459 0.11893466223008214 0.43709371712705786
"""
# the paper's averages of the same model. Its video average is 34.9, but the released scores of the 18 video data sets
# average to 34.6; we don't know why, so that one figure is pinned to the released scores below
PAPER = {"image": 64.9, "visdoc": 65.4, "All": 58.0}


def published() -> dict[str, Score]:
    values = [float(value) for value in PUBLISHED.split()]
    return {
        row.name: Score(row.name, row.modality, row.group, row.metric, value, "page", row.num_queries, row.num_queries)
        for row, value in zip(MMEB_V2, values, strict=True)
    }


def test_published_scores_give_the_published_averages():
    means = summarize(published())
    assert {label: round(100 * means[label].value, 1) for label in PAPER} == PAPER
    assert means["video"].value == pytest.approx(0.346, abs=5e-4)
    assert all(mean.complete for mean in means.values())
    assert means["All"].text() == "58.0"


def test_overall_is_the_mean_of_data_sets_not_of_modalities_or_groups():
    means = summarize(published())
    of_modalities = np.mean([means[m].value for m in ("image", "video", "visdoc")])
    of_groups = np.mean([mean.value for label, mean in means.items() if "-" in label or label == "VisDoc"])
    assert abs(means["All"].value - of_modalities) > 0.01 and abs(means["All"].value - of_groups) > 0.01
    assert means["All"].value == pytest.approx(
        (36 * means["image"].value + 18 * means["video"].value + 24 * means["visdoc"].value) / 78
    )


def test_the_page_fix_moves_the_average_by_the_published_amount():
    """VLM2Vec-V2, v2.0.1 to page-fixed: ViDoSeek-page 20.9 to 80.3, MMLongBench-page 11.9 to 44.7, VisDoc +3.8."""
    scores = published()
    before = scores | {
        name: replace(scores[name], value=value)
        for name, value in {"ViDoSeek-page": 0.209, "MMLongBench-page": 0.119}.items()
    }
    after = before | {
        name: replace(scores[name], value=value)
        for name, value in {"ViDoSeek-page": 0.803, "MMLongBench-page": 0.447}.items()
    }
    gain = summarize(after)["visdoc"].value - summarize(before)["visdoc"].value
    assert round(100 * gain, 1) == pytest.approx(68.6 - 64.8, abs=0.06)


def test_an_incomplete_average_never_looks_complete():
    scores = published()
    del scores["MSVD"]
    means = summarize(scores)
    assert not means["All"].complete and means["All"].text() == f"{100 * means['All'].value:.1f} (77 of 78)"
    assert means["V-RET"].text().endswith("(4 of 5)") and means["image"].complete
    scores = published()
    scores["K700"] = replace(scores["K700"], num_queries=999)
    assert summarize(scores)["video"].text().startswith("~")
    scores["K700"] = replace(scores["K700"], num_queries=100, expected_queries=100, fraction=0.1)
    assert not summarize(scores)["All"].complete
    assert summarize({})["All"].text() == "-" and not summarize({})["All"].complete


def test_the_error_of_a_mean_of_data_sets():
    scores = {
        n: Score(n, "image", "I-QA", "hit@1", 0.5, "x", 4, 4, standard_error=e) for n, e in (("a", 0.3), ("b", 0.4))
    }
    mean = summarize(scores, {"a": ("image", "I-QA"), "b": ("image", "I-QA")})["All"]
    assert mean.standard_error == pytest.approx(0.25)


def score_of(name, values, **kwargs):
    queries = {f"q{i}": float(v) for i, v in enumerate(values)}
    mean = float(np.mean(values))
    return Score(name, "image", "I-QA", "hit@1", mean, "x", len(values), len(values), per_query=queries, **kwargs)


def test_paired_bootstrap_matches_the_normal_interval_and_uses_the_pairing():
    rng = np.random.default_rng(0)
    hard = rng.random(2000)
    first, second = (rng.random(2000) < hard), (rng.random(2000) < np.clip(hard + 0.05, 0, 1))
    gap = paired_bootstrap({"a": score_of("a", first)}, {"a": score_of("a", second)}, samples=4000)
    differences = second.astype(float) - first
    error = differences.std(ddof=1) / math.sqrt(2000)
    assert gap.value == pytest.approx(differences.mean()) and gap.datasets == 1
    assert gap.low == pytest.approx(gap.value - 1.96 * error, abs=0.1 * error)
    assert gap.high == pytest.approx(gap.value + 1.96 * error, abs=0.1 * error)
    same = paired_bootstrap({"a": score_of("a", first)}, {"a": score_of("a", first)})
    assert (same.value, same.low, same.high) == (0, 0, 0), "equal answers leave nothing uncertain"
    with pytest.raises(ValueError, match="per-query"):
        paired_bootstrap({"a": score_of("a", first)}, {"b": score_of("b", first)})


def test_bootstrap_weighs_data_sets_equally():
    first = {"small": score_of("small", [0] * 10), "large": score_of("large", [0] * 1000)}
    second = {"small": score_of("small", [1] * 10), "large": score_of("large", [0] * 1000)}
    assert paired_bootstrap(first, second).value == 0.5


def test_the_leaderboard_form_has_78_entries_and_the_renamed_pages():
    scores = {name: replace(score, split_label="page-fixed") for name, score in published().items()}
    details = {"hit_rate_at_1": 0.4, "ndcg_at_5": 0.6, "map_official_at_10": 0.3, "f1_at_5": 0.2}
    scores["CIRR"] = replace(scores["CIRR"], details=details)
    del scores["MSVD"]
    entry = leaderboard_entry(ModelScores("a/b", "1" * 40, scores, {"embed_dim": 7}))
    json.dumps(entry)
    assert {modality: len(found) for modality, found in entry["metrics"].items()} == {
        "image": 36,
        "video": 18,
        "visdoc": 24,
    }
    assert "ViDoSeek-page-fixed" in entry["metrics"]["visdoc"] and "ViDoSeek-page" not in entry["metrics"]["visdoc"]
    assert entry["metrics"]["video"]["MSVD"] == "FILE_N/A"
    cirr = entry["metrics"]["image"]["CIRR"]
    assert cirr["hit@1"] == scores["CIRR"].value and cirr["ndcg_linear@5"] == 0.6 and cirr["map@10"] == 0.3
    assert cirr["f1@5"] == 0.2
    required = (
        "model_name model_backbone model_size embedding_dimension max_length_tokens model_release_date data_source "
        "url report_generated_date"
    )
    assert set(required.split()) <= entry["metadata"].keys()
    assert cirr["num_data"] == 1000 and entry["metadata"]["embedding_dimension"] == 7
    broken = leaderboard_entry(ModelScores("a/b", "1", published()))
    assert "ViDoSeek-page" in broken["metrics"]["visdoc"]


def test_two_splits_in_one_model_are_refused(tmp_path):
    scores = published()
    scores["K700"] = replace(scores["K700"], split_label="page-fixed")
    with pytest.raises(ValueError, match=r"mixes the splits \['page', 'page-fixed'\]"):
        _ = ModelScores("a", "b", scores).split_label
    with pytest.raises(FileNotFoundError, match="no result"):
        read_results([tmp_path])


def test_left_out_rows_and_surplus_queries_show_in_the_mean():
    for change in ({"details": {"broken_rows": 3}}, {"num_queries": 1001}):
        scores = published()
        scores["K700"] = replace(scores["K700"], **change)
        assert summarize(scores)["video"].text().startswith("~")


def stored(folder, task, entry, meta=None, date="2026-01-01"):
    """A result as mteb writes it, and the model's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_meta.json").write_text(json.dumps({"name": "a/b", "revision": "1", **(meta or {})}))
    scores = {"test": entry if isinstance(entry, list) else [entry]}
    content = {"task_name": task, "dataset_revision": "x", "scores": scores, "date": date}
    (folder / f"{task}.json").write_text(json.dumps(content))


def ours(dataset, value, digest, **more):
    fields = {"mmeb_name": dataset, "modality": "video", "group": "V-RET", "metric": "hit@1", "split_label": "x"}
    return {**fields, "main_score": value, "data_digest": digest, "hf_subset": "default", **more}


def test_the_score_that_a_run_used_last_counts(tmp_path):
    stored(tmp_path / "a/b/1", "one", ours("MSVD", 0.75, "A"), date="2026-01-01")
    stored(tmp_path / "a/b/1", "two", ours("MSVD", 1.0, "B"), date="2026-01-02")
    [newest] = read_results([tmp_path])
    assert newest.scores["MSVD"].value == 1.0 and newest.older == ("MSVD",)
    [used] = read_results([tmp_path], used=["A", "B", "A"])
    assert used.scores["MSVD"].value == 0.75


def test_results_of_one_checkpoint_in_two_folders_are_one_model(tmp_path):
    stored(tmp_path / "first/a__b/1", "one", ours("MSVD", 0.75, "A"))
    stored(tmp_path / "second/a__b/1", "two", ours("VATEX", 0.5, "B"))
    stored(tmp_path / "second/a__b/1/experiments/8", "two", ours("VATEX", 0.25, "B"), {"experiment_kwargs": {"d": 8}})
    models = read_results([tmp_path / "first", tmp_path / "second"])
    assert [sorted(model.scores) for model in models] == [["MSVD", "VATEX"], ["VATEX"]]


def test_only_the_languages_that_were_asked_count(tmp_path):
    entries = [{"hf_subset": name, "main_score": value} for name, value in (("en-en", 0.8), ("ko-ko", 0.2))]
    stored(tmp_path / "a/b/1", "STS17", entries)
    [every] = read_results([tmp_path])
    assert every.scores["STS17"].value == pytest.approx(0.5)
    [english] = read_results([tmp_path], parts={"STS17": {("test", "en-en")}})
    assert english.scores["STS17"].value == 0.8
    with pytest.raises(FileNotFoundError):  # one is missing
        read_results([tmp_path], parts={"STS17": {("test", "en-en"), ("test", "fr-en")}})
