"""What `pyproject.toml` declares: a lower bound for every dependency, and the jobs that run with it."""

from __future__ import annotations

from importlib.metadata import version

from tests.version_sets import ROOT, as_numbers, bounds


def test_every_dependency_has_a_lower_bound_that_is_met_here():
    found = bounds()  # fails on a dependency without one
    assert {"sentence-transformers", "transformers", "torch", "peft"} <= found.keys()
    for name, bound in found.items():
        assert as_numbers(version(name)) >= as_numbers(bound), name


def test_ci_runs_both_sets():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make lowest" in script and "tests.version_sets newest" in script
