"""mteb's own benchmarks on local data in their layout, with a bottleneck-token checkpoint, to the report."""

from __future__ import annotations

import json

import mteb
import pytest
from datasets import Dataset, Features, Image, Value

from evaluation.mmeb_v2.layouts import picture
from evaluation.report import main as report
from evaluation.reporting.scores import read_results
from evaluation.run import main
from evaluation.stock import stock_benchmark, stock_suite

TASK = "Vidore3FinanceEnRetrieval"


def write_vidore3(folder, languages):
    """A task of ViDoRe V3 as on the hub: a card that names three configurations a language, and their files."""
    card = ["---", "configs:"]
    for language in languages:
        tables = {
            "corpus": Dataset.from_dict(
                {"id": ["p0", "p1", "p2"], "image": [{"bytes": picture(i), "path": None} for i in range(3)]},
                features=Features(id=Value("string"), image=Image()),
            ),
            "queries": Dataset.from_dict({"id": ["q0", "q1"], "text": ["what is there", "and here"]}),
            "qrels": Dataset.from_dict({"query-id": ["q0", "q1"], "corpus-id": ["p0", "p2"], "score": [1, 2]}),
        }
        for name, table in tables.items():
            file = folder / f"{language}-{name}/test-00000-of-00001.parquet"
            file.parent.mkdir(parents=True)
            table.to_parquet(str(file))
            path = f"{file.parent.name}/{file.name}"
            card += [f"- config_name: {language}-{name}", "  data_files:", "  - split: test", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def test_vidore_v3_runs_with_a_btok_checkpoint_and_reaches_the_report(qwen, tmp_path, capsys):
    qwen.save_pretrained(str(tmp_path / "model"))
    task = next(task for task in mteb.get_benchmark("ViDoRe(v3)").tasks if task.metadata.name.startswith(TASK))
    name = task.metadata.name
    write_vidore3(tmp_path / "data" / task.metadata.dataset["path"], task.hf_subsets)
    words = ["--model", str(tmp_path / "model"), "--suite", "mteb:ViDoRe(v3)", "--subset", name, "--device", "cpu"]
    main([*words, "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "results"), "--report"])
    assert name in capsys.readouterr().out
    [model] = read_results([tmp_path / "results"])
    score = model.scores[name]
    assert (score.group, score.metric) == ("DocumentUnderstanding", "ndcg_at_10") and 0 < score.value <= 1
    assert score.details["entries"] == len(task.hf_subsets)
    text = (tmp_path / "results/report/report.md").read_text()
    assert "| All | " in text and "(1 of 10) |" in text, "nine tasks are missing, and that is said"
    assert f"| {name} | DocumentUnderstanding | ndcg_at_10 | - | - | {100 * score.value:.1f} |" in text
    report([str(tmp_path / "results"), "--output_dir", str(tmp_path / "other")])
    assert "(1 of 10)" not in (tmp_path / "other/report.md").read_text(), (
        "which benchmark was meant is not known there"
    )
    stored = next((tmp_path / "results").rglob(f"{name}.json"))
    assert json.loads(stored.read_text())["task_name"] == name
    again = [*words, "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "results")]
    time = stored.stat().st_mtime_ns
    main(again)
    assert stored.stat().st_mtime_ns == time, "equal data meet their own result"
    corpus = next((tmp_path / "data").rglob("*-corpus/*.parquet"))
    table = Dataset.from_parquet(str(corpus)).select([1, 0, 2])
    table.to_parquet(str(corpus))
    main(again)
    assert stored.stat().st_mtime_ns > time, "changed data are scored again"


def test_parts_of_a_benchmark_by_name():
    whole = mteb.get_benchmark("ViDoRe(v3)")
    name = whole.tasks[0].metadata.name
    part = stock_benchmark("ViDoRe(v3)", [name], "no/such/folder")
    assert [task.metadata.name for task in part.tasks] == [name] and len(mteb.get_benchmark("ViDoRe(v3)").tasks) == 10
    assert stock_suite(part) == {name: ("mteb", "DocumentUnderstanding")}
    with pytest.raises(ValueError, match=r"has no tasks \['K700'\]"):
        stock_benchmark("ViDoRe(v3)", ["K700"])
