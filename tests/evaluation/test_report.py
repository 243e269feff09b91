"""From mteb runs to a report on disk."""

from __future__ import annotations

import json
import shutil

import mteb
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.mini import MINI, mini_benchmark
from evaluation.mmeb_v2 import MMEB_V2
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.report import RUN_FILE, main, write_report
from evaluation.reporting.retrieval_sheet import _draw, retrieval_sheet
from evaluation.reporting.scores import read_results
from evaluation.task import mmeb_task
from evaluation.wrapping import wrap


@pytest.fixture
def run(tmp_path, oracle, random_encoder):
    """run(name, kind, groups) -> result folder of an oracle or a random model."""

    def start(name, kind, groups=("I-VG", "V-CLS"), split="test"):
        folder = tmp_path / "results"
        for task in mini_benchmark(split, groups=groups).tasks:
            task.load_data()
            data = task.dataset["default"][split]
            encoder = oracle(data) if kind == "oracle" else random_encoder(data, 0)
            fields = {"name": name, "revision": kind * 8, "embed_dim": 16 if kind == "oracle" else 32}
            encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=fields)
            mteb.evaluate(
                encoder,
                task,
                cache=mteb.ResultCache(folder),
                co2_tracker=False,
                show_progress_bar=False,
                prediction_folder=tmp_path / "predictions",
            )
        return folder

    return start


def test_models_stand_side_by_side_with_intervals_and_provenance(run, tmp_path):
    folder = run("test/oracle", "oracle")
    run("test/random", "random")
    record = {"command": "python -m evaluation.run", "hardware": "2 cores", "seed": 0, "started": "2026-01-01"}
    (folder / RUN_FILE).write_text(json.dumps([record]))
    models = read_results([folder])
    assert [model.name for model in models] == ["test/oracle", "test/random"]
    main([str(folder), "--output_dir", str(tmp_path / "report")])
    text = (tmp_path / "report/report.md").read_text()
    assert "split `mini-1/test`" in text
    assert "| All | 100.0 (2 of 9) ± 0.0 |" in text and "| I-QA | - | - |" in text
    assert "| I-VG | 100.0 ± 0.0 |" in text
    value = np.mean([score.value for score in models[1].scores.values()])
    assert f"{100 * value:.1f} (2 of 9) ±" in text
    assert "| mini-I-VG | I-VG | hit@1 | 100 of 100 | 12.5 | 100.0 ± 0.0 |" in text
    assert "| test/random | test/oracle | -" in text and "| yes |" in text
    assert "`python -m evaluation.run`: 2 cores, seed 0" in text and "checkpoint `oracleoracle" in text
    for name in ("groups.png", "sizes.png"):
        assert Image.open(tmp_path / "report" / name).width > 300


def test_a_missing_data_set_is_visible_in_the_report(run, tmp_path):
    folder = run("test/oracle", "oracle")
    three = {row.name: (row.modality, row.group) for row in MINI if row.group in ("I-QA", "I-VG", "V-CLS")}
    text = write_report([folder], tmp_path / "report", expected=three).read_text()
    assert "| All | 100.0 (2 of 3) ± 0.0 |" in text and "| I-QA | - |" in text


def test_checkpoints_of_one_name_are_told_apart(run, tmp_path):
    folder = run("test/same", "oracle")
    run("test/same", "random")
    text = write_report([folder], tmp_path / "report").read_text()
    assert "|  | test/same@oracleor | test/same@randomra |" in text
    assert "| test/same@randomra | test/same@oracleor | -" in text


def test_a_complete_suite_is_printed_without_a_reservation(run, tmp_path):
    folder = run("test/oracle", "oracle", groups=None)
    text = write_report([folder], tmp_path / "report").read_text()
    assert "| All | 100.0 ± 0.0 |" in text and " of 9)" not in text


def test_two_splits_are_not_compared(run, tmp_path):
    folder = run("test/oracle", "oracle")
    run("test/random", "random", split="validation")
    with pytest.raises(ValueError, match="results of the splits"):
        write_report([folder], tmp_path / "report")


@pytest.mark.parametrize("group", ["I-VG", "V-CLS"])
def test_retrieval_sheets_mark_right_and_wrong(group, run, tmp_path):
    run("test/random", "random")
    task = mini_benchmark(groups=[group]).tasks[0]
    task.load_data()  # its name, and so the file's, holds the hash of its data
    predictions = tmp_path / "predictions" / task.prediction_file_name
    path = retrieval_sheet(task, predictions, tmp_path / "sheet.png", num_queries=4, top=3)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    green, red = (
        (np.abs(pixels.astype(int) - colour).sum(-1) < 12).sum() for colour in ((46, 139, 87), (192, 57, 43))
    )
    assert green > 50 and red > 50
    other = mini_benchmark(groups=["VisDoc"]).tasks[0]
    with pytest.raises(ValueError, match="ranks none of the queries"):
        retrieval_sheet(other, _renamed(predictions, tmp_path), tmp_path / "x.png")


@pytest.mark.parametrize("picture", [None, Image.new("RGB", (8, 8))])
def test_dollars_in_a_sheet_are_dollars(picture, tmp_path):
    figure = Figure()
    axes = figure.subplots()
    _draw(axes, {"text": "$10% and $20", "image": picture}, "#000000", "query")
    figure.savefig(tmp_path / "sheet.png")
    shown = axes.xaxis.label if picture else axes.texts[0]
    assert shown.get_text() == "$10% and $20" and not shown.get_parse_math()


def _renamed(predictions, folder):
    content = json.loads(predictions.read_text())
    content["default"]["test"] = {f"other-{k}": v for k, v in content["default"]["test"].items()}
    (folder / "renamed.json").write_text(json.dumps(content))
    return folder / "renamed.json"


def test_two_protocols_are_not_compared_and_each_has_a_report(tmp_path, write, oracle):
    row = next(row for row in MMEB_V2 if row.name == "ViDoRe_esg_reports_human_labeled_v2")
    written = write(row)
    for protocol in ("vlm2vec", "btoks"):
        task = mmeb_task(written.row, DataRoot(written.root, offline=True), protocol=protocol)
        task.load_data()
        encoder = oracle(task.dataset["default"]["test"])
        options = {"cache": mteb.ResultCache(tmp_path / "results"), "co2_tracker": False, "show_progress_bar": False}
        mteb.evaluate(encoder, task, **options)
    assert [model.protocol for model in read_results([tmp_path / "results"])] == ["btoks", "vlm2vec"]
    with pytest.raises(ValueError, match="protocols .*not comparable.*--protocol"):
        write_report([tmp_path / "results"], tmp_path / "report")
    main([str(tmp_path / "results"), "--output_dir", str(tmp_path / "report"), "--protocol", "btoks"])
    text = (tmp_path / "report/report.md").read_text()
    assert (
        "# Results on split `page-fixed`, protocol `btoks`" in text and "split `page-fixed`, protocol `btoks`" in text
    )
    assert "100.0 as the benchmark's harness reckons nDCG@5" in text
    entry = json.loads((tmp_path / "report/test__table.json").read_text())
    assert entry["metadata"]["protocol"] == "btoks"
    with pytest.raises(ValueError, match="no result of protocol 'other'"):
        write_report([tmp_path / "results"], tmp_path / "report", protocol="other")


def test_sizes_are_named_and_none_hides_another(run, tmp_path):
    """Truncations beside a whole embedding are a curve; alone they are columns with the size in the name."""
    folder = run("test/whole", "oracle")
    place = next(folder.rglob("model_meta.json")).parent
    meta = json.loads((place / "model_meta.json").read_text())
    for size in (8, 24):
        shutil.copytree(place, tmp_path / f"results/other/{size}")
        changed = {**meta, "name": "test/cut", "experiment_kwargs": {"truncate_dim": size}, "embed_dim": size}
        (tmp_path / f"results/other/{size}/model_meta.json").write_text(json.dumps(changed))
    text = write_report([folder], tmp_path / "report").read_text()
    assert "|  | test/cut, first 24 numbers | test/cut, first 8 numbers | test/whole |" in text


def test_what_was_left_out_is_a_remark_and_a_part_is_no_submission(write, pixels, tmp_path):
    written = write(next(row for row in MMEB_V2 if row.name == "MSVD"))
    for fraction in (1.0, 0.5):
        task = mmeb_task(written.row, DataRoot(written.root, offline=True), fraction=fraction)
        out = tmp_path / f"out{fraction}"
        options = {"cache": mteb.ResultCache(out), "co2_tracker": False, "show_progress_bar": False}
        mteb.evaluate(wrap(pixels, "test/pixels"), task, **options)
        text = write_report([out], tmp_path / f"report{fraction}").read_text()
        assert "- MSVD: 3 rows, candidates or pages were left out or missing." in text or fraction < 1
        assert (tmp_path / f"report{fraction}/test__pixels.json").exists() == (fraction == 1)
