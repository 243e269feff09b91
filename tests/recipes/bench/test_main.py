"""`python -m recipes.bench NAME` finds every benchmark, and says which there are."""

from __future__ import annotations

import sys
import types

import pytest

from recipes.bench import __main__ as benchmark


def test_the_first_word_names_the_benchmark(monkeypatch):
    seen = []
    fake = types.SimpleNamespace(main=lambda: seen.append(sys.argv))
    monkeypatch.setitem(sys.modules, "recipes.bench.step", fake)
    monkeypatch.setattr(sys, "argv", ["benchmark", "step", "--rounds", "1"])
    benchmark.main()
    assert seen == [["benchmark", "--rounds", "1"]]


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--help"]])
def test_without_a_name_it_says_which_there_are(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit, match="step"):
        benchmark.main()
