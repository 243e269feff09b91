"""One run after another on data that change, break and come back: scores are never of other data."""

from __future__ import annotations

import json
import shutil

import mteb
import numpy as np
import pytest
import torch

from evaluation.atomic_write import read_json
from evaluation.mmeb_v2 import MMEB_V2
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.report import RUN_FILE, write_report
from evaluation.reporting.scores import read_results
from evaluation.result_cache import WholeResultCache
from evaluation.run import main
from evaluation.task import mmeb_v2_benchmark
from evaluation.wrapping import wrap


def row_of(name):
    return next(row for row in MMEB_V2 if row.name == name)


@pytest.fixture
def score(pixels, tmp_path, monkeypatch, capsys):
    """score(root, *names, **flags) -> what a run prints; `.model` is what it scores."""
    monkeypatch.setattr("evaluation.scoring.load_model", lambda *words: pixels)

    def run(root, *names, more=()):
        words = ["--model", "test/pixels", "--suite", "mmeb-v2", "--data", str(root), "--offline", "--subset", *names]
        try:
            main([*words, "--device", "cpu", "--output_dir", str(tmp_path / "out"), *more])
        finally:
            run.shown = capsys.readouterr().out
        return run.shown

    run.out = tmp_path / "out"
    return run


def results(folder):
    return sorted(path for path in folder.rglob("MMEB-V2.*.json") if "predictions" not in path.parts)


def entry_of(path):
    return json.loads(path.read_text())["scores"]["test"][0]


def test_unpacking_the_rest_of_the_videos_is_another_score(write, score, pixels, tmp_path):
    """With some of the videos a score stands; after the others came, the same command scores all of them."""
    written = write(row_of("ActivityNetQA"))
    place = written.root / written.row.media_roots[0]
    (place / "v_2").rename(tmp_path / "3")
    (place / "v_3").rename(tmp_path / "4")
    first = score(written.root, "ActivityNetQA")
    assert " 2 queries" in first
    (tmp_path / "3").rename(place / "v_2")
    (tmp_path / "4").rename(place / "v_3")
    second = score(written.root, "ActivityNetQA")
    assert " 4 queries" in second and len(results(score.out)) == 2
    pixels[0].calls.clear()
    assert score(written.root, "ActivityNetQA") == second and not pixels[0].calls, "equal data meet their own result"
    (place / "v_0/frame_0001.jpg").write_bytes((place / "v_1/frame_0001.jpg").read_bytes())
    assert score(written.root, "ActivityNetQA") != second and pixels[0].calls, "one frame is another picture"
    assert len(results(score.out)) == 3


def test_overwrite_scores_and_encodes_again(write, score, pixels):
    root = write(row_of("MSVD")).root
    shown = score(root, "MSVD")
    pixels[0].calls.clear()
    assert score(root, "MSVD", more=["--overwrite"]) == shown
    assert pixels[0].calls and len(results(score.out)) == 1


def test_missing_and_torn_sets_are_listed_first_and_the_others_are_scored(write, score, pixels, monkeypatch):
    good, torn = write(row_of("GQA")), write(row_of("ViDoRe_docvqa"))
    file = next((torn.root / torn.row.hub_id / "corpus").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    order = []
    monkeypatch.setattr("builtins.print", lambda *words, **options: order.append(("print", " ".join(words))))
    encode = pixels.encode_query
    monkeypatch.setattr(pixels, "encode_query", lambda *a, **k: order.append(("encode", "")) or encode(*a, **k))
    with pytest.raises(SystemExit, match="2 data sets have no score: HMDB51, ViDoRe_docvqa") as stop:
        score(good.root, "HMDB51", "GQA", "ViDoRe_docvqa", more=["--report"])
    assert stop.value.code, "the exit status is not 0"
    told = [text for kind, text in order[: order.index(("encode", ""))] if kind == "print"]
    assert "2 of 3 data sets can't be scored, 1 are" in "".join(told)
    assert "HMDB51: FileNotFoundError" in "".join(told) and "ViDoRe_docvqa: " in "".join(told)
    assert [path.name.split(".")[2] for path in results(score.out)] == ["GQA"]
    report = (score.out / "report/report.md").read_text()
    assert "## Missing data sets" in report and "77 of 78" in report and "- HMDB51: FileNotFoundError" in report
    assert set(read_json(score.out / RUN_FILE)[-1]["missing"]) == {"HMDB51", "ViDoRe_docvqa"}


def test_an_embedding_that_is_not_finite_is_named_and_never_stored(write, score, pixels, monkeypatch):
    root = write(row_of("MSVD")).root
    vector = pixels[0]._vector

    def broken(entry):
        found = vector(entry)
        return torch.full_like(found, torch.nan) if "caption 2" in str(entry) else found

    monkeypatch.setattr(pixels[0], "_vector", broken)
    with pytest.raises(SystemExit, match="1 data sets have no score: MSVD"):
        score(root, "MSVD")
    why = read_json(score.out / RUN_FILE)[-1]["missing"]["MSVD"]
    assert "of the embedding of row 'q2', 48 of 48 numbers are NaN" in why and not results(score.out)
    monkeypatch.setattr(pixels[0], "_vector", vector)
    score(root, "MSVD")
    assert entry_of(results(score.out)[0])["num_queries"] == 5, "what was stored before is finite"


def test_a_full_disk_is_one_line_and_what_was_stored_is_whole(write, score, monkeypatch):
    good = write(row_of("GQA")).root
    write(row_of("MSVD"))
    save = WholeResultCache.save_to_cache

    def full(self, result, *args, **kwargs):
        if "MSVD" in result.task_name:
            raise OSError(28, "No space left on device")
        return save(self, result, *args, **kwargs)

    monkeypatch.setattr(WholeResultCache, "save_to_cache", full)
    with pytest.raises(SystemExit, match="evaluation.run: .*No space left on device") as stop:
        score(good, "GQA", "MSVD")
    assert "\n" not in str(stop.value)
    assert [path.name.split(".")[2] for path in results(score.out)] == ["GQA"]


def test_reports_do_not_pair_models_over_different_data(write, pixels, tmp_path):
    written = write(row_of("ActivityNetQA"))
    place = written.root / written.row.media_roots[0]

    def run(name):
        options = {"cache": WholeResultCache(tmp_path / "out"), "co2_tracker": False, "show_progress_bar": False}
        benchmark = mmeb_v2_benchmark(DataRoot(written.root, offline=True), subset=["ActivityNetQA"])
        return mteb.evaluate(wrap(pixels, name), benchmark, **options)

    run("test/first")
    run("test/same")
    shutil.rmtree(place / "v_3")
    run("test/later")
    text = write_report([tmp_path / "out"], tmp_path / "report").read_text()
    differences = text[text.index("## Differences") :]
    assert "| test/same | test/first |" in differences and "| test/later |" not in differences
    data = text[text.index("## Different data") :]
    assert "| 4 | test/first, test/same |" in data and "| 3 | test/later |" in data
    run("test/first")
    with_two = {model.name: model for model in read_results([tmp_path / "out"])}
    assert (
        with_two["test/first"].older == ("ActivityNetQA",)
        and with_two["test/first"].scores["ActivityNetQA"].num_queries == 3
    )
    text = write_report([tmp_path / "out"], tmp_path / "report").read_text()
    assert "| test/later | test/first |" in text or "| test/first | test/later |" in text
    assert "- test/first: ActivityNetQA." in text, "the older score is mentioned"


def test_results_of_earlier_versions_are_read_or_refused_in_one_line(write, score, pixels):
    root = write(row_of("MSVD")).root
    score(root, "MSVD")
    file = results(score.out)[0]
    content = json.loads(file.read_text())
    for name in ("data_digest", "inputs", "prompts", "expected_queries", "standard_error", "chance", "protocol"):
        del content["scores"]["test"][0][name]
    file.write_text(json.dumps(content))
    [model] = read_results([score.out])
    assert model.scores["MSVD"].data.startswith("before-") and np.isnan(model.scores["MSVD"].chance)
    assert " nan" not in write_report([score.out], score.out / "report").read_text()
    del content["scores"]["test"][0]["group"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is a result in another form .*'group'.*score the data set again"):
        read_results([score.out])


class Named:
    """What a model was asked: the prompts, and the texts."""

    def __init__(self, pixels, monkeypatch):
        self.asked = []
        for side in ("query", "document"):
            encode = getattr(pixels, f"encode_{side}")

            def note(inputs, *args, encode=encode, side=side, **kwargs):
                texts = [entry if isinstance(entry, str) else entry.get("text", "") for entry in inputs]
                self.asked.append((side, kwargs.get("prompt"), texts))
                return encode(inputs, *args, **kwargs)

            monkeypatch.setattr(pixels, f"encode_{side}", note)

    def of(self, side):
        return {(prompt, text) for asked, prompt, texts in self.asked if asked == side for text in texts}


def test_the_tasks_instruction_takes_the_place_of_the_models_prompt(write, score, pixels, monkeypatch):
    pixels.prompts = {"query": "find: ", "document": "passage: "}
    root = write(row_of("GQA")).root
    write(row_of("MSVD"))
    named = Named(pixels, monkeypatch)
    shown = score(root, "GQA", "MSVD")
    assert "the model's own query prompt 'find: ' is left out: the task's instruction takes its place" in shown
    assert "as in GQA: 'Represent the given image with the following question:'" in shown
    assert {prompt for prompt, _ in named.of("query")} == {""}
    # labels have no instruction, and keep the model's prompt; videos have one
    prompts = {text: prompt for prompt, text in named.of("document")}
    assert prompts["caption 1"] == "passage: " and prompts["Understand the content of the provided video."] == ""
    entry = next(entry_of(path) for path in results(score.out) if "MSVD" in path.name)
    assert entry["prompts"]["query"]["model"] == "find: " and entry["prompts"]["query"]["shown"] == "task"

    named.asked.clear()
    shown = score(root, "GQA", "MSVD", more=["--model_prompts"])
    assert "stands before the task's instruction" in shown
    assert {prompt for prompt, _ in named.of("query")} == {"find: "}
    names = {path.name.removesuffix(".json").split(".data-")[0] for path in results(score.out)}
    assert names == {f"MMEB-V2.vlm2vec.{name}{part}" for name in ("GQA", "MSVD") for part in ("", ".model-prompts")}


def test_instructions_as_prompts_or_nowhere_and_on_candidates(write, score, pixels, monkeypatch):
    pixels.prompts = {"query": "find: "}
    root = write(row_of("MSVD")).root
    named = Named(pixels, monkeypatch)
    score(root, "MSVD", more=["--instruction", "system", "--candidate_instruction", "Represent the user's input."])
    told = "Find the video snippet that corresponds to the given summary:"
    assert named.of("query") == {(told, f"caption {i}") for i in range(5)}
    assert named.of("document") == {("Represent the user's input.", "")}
    named.asked.clear()
    shown = score(root, "MSVD", more=["--instruction", "none"])
    assert named.of("query") == {("find: ", f"caption {i}") for i in range(5)}
    assert "query prompt 'find: ' stands where the task has no instruction" in shown
    assert named.of("document") == {(None, "")}
    named.asked.clear()
    score(root, "MSVD", more=["--candidate_instruction", "Represent it."])
    assert named.of("document") == {("", "Represent it.")}
    found = {path.name.removesuffix(".json").split(".data-")[0] for path in results(score.out)}
    starts = ("candidates-", "instruction-none", "instruction-system.candidates-")
    assert all(
        name.startswith(f"MMEB-V2.vlm2vec.MSVD.{start}") for name, start in zip(sorted(found), starts, strict=True)
    )


def test_data_that_come_back_have_their_own_score_in_the_report(write, score, tmp_path):
    written = write(row_of("ActivityNetQA"))
    place = written.root / written.row.media_roots[0]

    def reported():
        score(written.root, "ActivityNetQA", more=["--report"])
        text = (score.out / "report/report.md").read_text()
        return next(line.split("|")[4].strip() for line in text.splitlines() if line.startswith("| ActivityNetQA"))

    assert reported().startswith("4 of")
    (place / "v_3").rename(tmp_path / "v_3")
    assert reported().startswith("3 of")
    (tmp_path / "v_3").rename(place / "v_3")
    assert reported().startswith("4 of")
    shutil.rmtree(place)
    with pytest.raises(SystemExit, match="no score"):
        score(written.root, "ActivityNetQA", more=["--report"])
    write_report([score.out], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "- ActivityNetQA: ValueError" in text and "Its score is of an earlier run." in text


def test_a_sheet_that_cant_be_drawn_loses_no_score(write, score, monkeypatch, caplog):
    root = write(row_of("MSVD")).root

    def broken(*args):
        raise ValueError("parse error in $10% and $20")

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.scoring.retrieval_sheet", broken)
        assert "MSVD" in score(root, "MSVD", more=["--sheets"])
    assert "the sheet of MSVD can't be drawn" in caplog.text
    score(root, "MSVD", more=["--sheets"])
    assert len(list(score.out.rglob("*.png"))) == len(results(score.out)) == 1, "it is drawn from the stored rankings"
    shutil.rmtree(score.out / "predictions")
    score(root, "MSVD", more=["--sheets"])
    assert "MSVD has no sheet: its stored score came without rankings" in caplog.text


def test_scores_are_printed_before_a_report_that_fails(write, score, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("two of a kind")

    monkeypatch.setattr("evaluation.scoring.write_report", broken)
    with pytest.raises(SystemExit, match="no report: two of a kind"):
        score(write(row_of("MSVD")).root, "MSVD", more=["--report"])
    assert "MSVD" in score.shown and "plain mean" in score.shown


def test_suites_in_one_folder_have_reports_of_their_own(write, score, pixels):
    score(write(row_of("MSVD")).root, "MSVD")
    words = ["--model", "test/pixels", "--subset", "V-CLS", "--device", "cpu", "--output_dir", str(score.out)]
    for seed in ("0", "1"):
        main([*words, "--seed", seed, "--report"])
        text = (score.out / "report/report.md").read_text()
        assert "| mini-V-CLS |" in text and "| MSVD |" not in text


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--suite", "mini", "--fraction", "0.1"], "--fraction are of --suite mmeb-v2"),
        (["--suite", "mini", "--protocol", "btoks", "--page_split", "page"], "--protocol and --page_split are"),
        (["--suite", "mmeb-v2", "--split", "validation"], "--split is of --suite mini"),
        (["--suite", "mteb:MIEB(lite)", "--split", "train"], "--split is of --suite mini"),
        (["--model", "open_clip:ViT-B-32/x", "--pooling", "lasttoken"], "open_clip's models have a pooling"),
    ],
)
def test_settings_of_another_suite_are_refused(words, why):
    with pytest.raises(SystemExit, match=why):
        main(["--model", "a/b", *words])


def test_what_mteb_passes_over_has_no_score(monkeypatch, tmp_path, pixels):
    """mteb answers a private task with an error in its result, and raises none."""
    monkeypatch.setattr("evaluation.scoring.load_model", lambda *words: pixels)
    task = next(task for task in mteb.get_benchmark("ViDoRe(v3)").tasks if not task.metadata.is_public)
    words = ["--model", "test/pixels", "--suite", "mteb:ViDoRe(v3)", "--subset", task.metadata.name, "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"1 data sets have no score: {task.metadata.name}"):
        main([*words, "--output_dir", str(tmp_path)])


def test_two_runs_in_one_folder_keep_their_own_records(write, score, monkeypatch):
    """The second one ends first."""
    root = write(row_of("MSVD")).root
    other = {"command": "other", "started": "9999", "missing": {}}
    evaluate = mteb.evaluate

    def slow(*args, **kwargs):
        runs = read_json(score.out / RUN_FILE)
        (score.out / RUN_FILE).write_text(json.dumps([*runs, other]))
        raise ValueError("too slow")

    monkeypatch.setattr(mteb, "evaluate", slow)
    with pytest.raises(SystemExit, match="no score: MSVD"):
        score(root, "MSVD")
    monkeypatch.setattr(mteb, "evaluate", evaluate)
    first, second = read_json(score.out / RUN_FILE)
    assert first["missing"] == {"MSVD": "ValueError: too slow"} and second == other
