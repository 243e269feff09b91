"""A log of runs that was torn while a line was written goes on behind the last whole one."""

from __future__ import annotations

import json

import pytest

from recipes.research.run_log import RunLog


@pytest.mark.parametrize("rest", ['\n{"key": "a", "seed": 1, "sc', ""], ids=["in a line", "before its end"])
def test_a_torn_last_line_is_dropped_and_its_run_is_made_again(tmp_path, rest):
    path = tmp_path / "runs.jsonl"
    first, second = {"key": "a", "seed": 0, "score": 1.5}, {"key": "a", "seed": 1, "score": 2.5}
    path.write_text(json.dumps(first) + rest)
    log = RunLog(path)
    assert log.find({"key": "a", "seed": 0}) == first and log.find({"key": "a", "seed": 1}) is None
    log.add(second)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [first, second]
    assert RunLog(path).find({"seed": 1}) == second and RunLog(tmp_path / "none.jsonl").lines == []


def test_a_whole_file_is_only_read(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"seed": 0}\n')
    path.chmod(0o444)
    before = path.stat()
    assert RunLog(path).lines == [{"seed": 0}]
    assert path.stat().st_mtime_ns == before.st_mtime_ns
