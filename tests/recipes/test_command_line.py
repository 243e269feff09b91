"""Flags are answered without torch, and what a user did wrong is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recipes import command_line

ROOT = Path(__file__).parents[2]
WITH_A_BATCH = ("train", "compare", "quickstart", "study", "bench step")
COMMANDS = (
    *WITH_A_BATCH,
    "encode_corpus",
    "encode_corpus_ray",
    "search",
    "search index",
    "research.pretrain",
    "research.distill_to_last_token",
    "research.seeing",
)
# Run in a fresh process: what the command prints, and whether torch was imported for it.
FRESH = """
import runpy, sys
module, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__")
finally:
    print("torch:", "torch" in sys.modules)
"""


def started(command: str, *arguments: str) -> subprocess.CompletedProcess:
    module, *first = f"recipes.{command}".split()
    words = [sys.executable, "-c", FRESH, module, *first, *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_is_answered_before_torch_is_imported(command):
    done = started(command, "--bach_size", "3", "--data", "x", "--backbone", "y")
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert line.startswith("st_btok: unrecognized arguments: --bach_size") or "are required" in line
    assert "--help" in line and "torch: False" in done.stdout
    if command in WITH_A_BATCH:
        assert "did you mean --batch_size?" in line


def test_a_mistyped_option_of_a_variant_is_answered_before_torch_is_imported():
    words = ["--data", "x", "--backbone", "y", "--variants", "btok:condensation_wieght=0"]
    done = started("compare", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "torch: False" in done.stdout, done.stderr
    assert done.stderr.startswith("st_btok: 'condensation_wieght'") and "mean condensation_weight? --h" in done.stderr
    done = started("compare", *words, "--traceback")
    assert "Traceback" in done.stderr and "ValueError: 'condensation_wieght'" in done.stderr


@pytest.mark.parametrize("command", (*COMMANDS, "data.real"))
def test_help_is_printed_before_torch_is_imported(command):
    done = started(command, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and "torch: False" in done.stdout
    if command == "train":
        assert "--condensation_weight" in done.stdout and "--weight_decay" in done.stdout
    if command in WITH_A_BATCH:
        assert "--batch_size" in done.stdout


def test_a_search_without_a_query_is_answered_before_torch_is_imported():
    done = started("search", "query", "index", "--model", "x")
    assert done.returncode == 2 and "give a text, an --image or both" in done.stderr and "torch: False" in done.stdout


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error", [ValueError("a must be b,\n  got c"), RuntimeError("x"), OSError("x"), KeyboardInterrupt("stopped at 3")]
)
def test_what_a_user_can_mend_is_one_line(error, monkeypatch):
    monkeypatch.setattr(command_line, "_OURS", (f"{__name__}.",))
    with pytest.raises(SystemExit) as ended:
        command_line.run(raising(error))
    assert ended.value.code.strip() == f"st_btok: {' '.join(str(error).split())}"


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(command_line, "_OURS", (f"{__name__}.",))
    with pytest.raises(SystemExit, match=r"No module named 'matplotlib'\. It comes with an extra.*'\.\[train\]'"):
        command_line.run(raising(ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot")))


def test_other_errors_keep_their_traceback_and_the_flag_shows_all(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 / 0)
    with pytest.raises(ValueError, match="invalid literal"):  # raised by no code of ours
        command_line.run(lambda: int("x"))
    monkeypatch.setattr(sys, "argv", ["x", "--traceback"])
    with pytest.raises(OSError, match="gone"):
        command_line.run(raising(OSError("gone")))
