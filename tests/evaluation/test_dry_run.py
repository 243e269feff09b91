"""The dry run on three families: it takes the whole way, and its costs are counted per data set."""

from __future__ import annotations

import pytest

from evaluation.dry_run import main
from evaluation.mmeb_v2 import MMEB_V2
from evaluation.mmeb_v2.image import load_image
from evaluation.mmeb_v2.layouts import FullSize
from evaluation.mmeb_v2.sources import DataRoot
from evaluation.mmeb_v2.video import load_video
from evaluation.mmeb_v2.visdoc import load_visdoc

FAMILIES = {row.family: row for row in reversed(MMEB_V2)}
LOADERS = {"image": load_image, "video": load_video, "visdoc": load_visdoc}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_synthetic_data_set_is_good(family, tmp_path):
    row = FullSize(FAMILIES[family], tmp_path, 0.004).write()
    loaded = LOADERS[row.modality](row, DataRoot(tmp_path, offline=True))
    assert len(loaded.data["queries"]) == row.num_queries >= 2
    assert not loaded.broken and not loaded.skipped_queries
    assert len(loaded.data["corpus"]) > 1


def test_the_table_has_what_each_data_set_took(tmp_path, capsys):
    words = ["--fraction", "0.004", "--subset", "RefCOCO", "Video-MME", "ViDoRe_docvqa", "--output_dir", str(tmp_path)]
    main(words)
    shown = capsys.readouterr().out
    assert shown.startswith("`python -m evaluation.dry_run --fraction 0.004 --subset RefCOCO")
    for name, queries in (("RefCOCO", 4), ("Video-MME", 11), ("ViDoRe_docvqa", 2), ("all", 17)):
        assert f"| {name} | {queries} |" in shown
    assert "(3 of 78)" in (tmp_path / "report/report.md").read_text()
    with pytest.raises(SystemExit):
        main(["--fraction", "0"])


def test_one_set_missing_one_torn_and_one_changed_after_scoring(tmp_path, capsys):
    main(["--fraction", "0.02", "--faults", "--output_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    lines = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in shown.splitlines() if "|" in line
    }
    good, missing, torn, changed = (lines[name][2:] for name in ("GQA", "HMDB51", "ViDoRe_docvqa", "MSVD"))
    assert good[0] == good[1] and good[0].startswith("20 queries, data `")
    assert all("FileNotFoundError" in text for text in missing)
    assert torn[0] == torn[1] and "queries" not in torn[0]
    counts = [int(text.split()[0]) for text in changed]
    assert counts == [8, 13] and changed[0].split("data")[1] != changed[1].split("data")[1]
    assert len(list(tmp_path.rglob("MMEB-V2.vlm2vec.GQA.*.json"))) == 1
    assert len(list(tmp_path.rglob("MMEB-V2.vlm2vec.MSVD.*.json"))) == 2
