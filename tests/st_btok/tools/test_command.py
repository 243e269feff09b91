"""The console script: every command's arguments reach its `main`, and nothing heavy is loaded to parse them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

from st_btok.tools.command import COMMANDS, main, parser_of_all

HEAVY = ("torch", "transformers", "sentence_transformers", "numpy", "PIL", "peft", "datasets")
# Run in a fresh process: what `--help` prints, and which heavy modules it took.
HELP = f"""
import sys
from st_btok.tools.command import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_heavy(name):
    found = subprocess.run([sys.executable, "-c", HELP, name, "--help"], capture_output=True, text=True)
    assert f"usage: st-btok {name}" in found.stdout and "loaded: []" in found.stdout, found.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_are_those_of_the_main_that_takes_them(name):
    describe, module = COMMANDS[name]
    commands = next(action for action in parser_of_all()._actions if action.dest == "command")
    described = {action.dest for action in commands.choices[name]._actions} - {"help"}
    taken = inspect.signature(import_module(module).main).parameters
    assert described == set(taken)
    assert (describe.__doc__ or "").endswith(".") and "\n" not in describe.__doc__, "one line: it is the help"


def test_without_a_command_the_usage_names_them(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "COMMAND" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_our_errors_are_one_line_and_others_keep_their_traceback(tmp_path, monkeypatch, capsys):
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "dst")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("st-btok convert: SRC must be a directory") and error.count("\n") == 1
    assert main(["explain", "model"]) == 2
    assert "Give an --image, a --text or both" in capsys.readouterr().err

    def fails_inside(*args, **kwargs):
        int("no number")

    monkeypatch.setattr("st_btok.tools.convert.convert", fails_inside)
    with pytest.raises(ValueError, match="no number"):  # raised here in the test, so it is nobody's message to a user
        main(["convert", "src", "dst"])
