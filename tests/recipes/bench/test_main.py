"""`python -m recipes.bench NAME` finds every benchmark, hands its flags on, and says which there are."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from recipes.bench import __main__ as bench
from recipes.bench.settings import BENCHMARKS


def test_the_first_word_names_the_benchmark(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "recipes.bench.step", types.SimpleNamespace(main=seen.append))
    monkeypatch.setattr(sys, "argv", ["bench", "step", "--rounds", "1"])
    bench.main()
    assert [type(config) for config in seen] == [BENCHMARKS["step"]] and seen[0].rounds == 1


def test_every_module_beside_it_is_a_benchmark():
    modules = {path.stem for path in Path(bench.__file__).parent.glob("[!_]*.py")} - {"settings", "paired"}
    assert modules == BENCHMARKS.keys()


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--help"]])
def test_without_a_name_it_says_which_there_are(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit, match="step"):
        bench.main()
