"""The console script: every command's arguments reach its `main`, and nothing heavy is loaded to parse them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from safetensors.numpy import save_file

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
    described = {action.dest for action in commands.choices[name]._actions} - {"help", "traceback"}
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


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder that looks like a model, from whose parent the commands are run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "final").mkdir(parents=True)
    (tmp_path / "out" / "final" / "config.json").write_text("{}")
    (tmp_path / "photograph.png").write_bytes(b"no picture")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("check ./typo", "an existing folder or a hub name, there is no ./typo (looked from"),
        ("check ./out/finl", "there is no ./out/finl (did you mean out/final?)"),
        ("check out", "must hold a config.json, out holds none: did you mean out/final?"),
        ("check photograph.png", "photograph.png is a file: give its folder"),
        ("check out/final --json nowhere/verdicts.json", "there is no nowhere: make it first"),
        ("check out/final --templte=plain", "--templte=plain (did you mean --template?)"),
        ("check out/final --template chet", "(did you mean chat?)"),
        ("chekc out/final", "(did you mean check?)"),
        ("explain out/final --image nope.png", "must be a file that exists, there is no nope.png (looked from"),
        ("explain out/final --image photogaph.png", "there is no photogaph.png (did you mean photograph.png?)"),
        ("explain out/final --image out", "out is a folder: name a file in it"),
        ("explain out/final --image photograph.png --out out", "out is a folder: add a file name"),
        ("convert nowhere dst", "must be a directory, nowhere does not exist"),
    ],
)
def test_what_is_not_there_is_one_line_before_anything_heavy(words, said, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("st_btok.tools.command.import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith("st_btok: ") and said in error and "--help` lists" in error


def test_a_check_first_says_how_long_it_takes(checkpoint, monkeypatch, capsys):
    def said(name):
        printed.append(capsys.readouterr().out)  # before what does the work is imported
        raise ImportError("stop here")

    printed: list[str] = []
    monkeypatch.setattr("st_btok.tools.command.import_module", said)
    weights = checkpoint / "out/final/model.safetensors"
    save_file({"a": np.zeros((1000, 500), np.float16), "b": np.zeros(7, np.float32)}, weights, {"format": "pt"})
    for header in (None, b'{"a": {"dtype": "BF16", "shape": [2200, 1000000], "data_offsets": [0, 1]}}', b"torn"):
        if header:
            weights.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ImportError):
            main(["check", "out/final"])
    with pytest.raises(ImportError):
        main(["check", "owner/on-the-hub"])
    assert printed[0] == "Checking on the CPU: roughly 20 seconds for 0.5 million parameters.\n"
    assert printed[1] == "Checking on the CPU: roughly 8 minutes for 2,200.0 million parameters.\n"
    assert printed[2] == printed[3] and "7 minutes for 2 billion, besides a download" in printed[2]


def test_errors_for_the_user_are_one_line_and_others_keep_their_traceback(checkpoint, monkeypatch, capsys):
    assert main(["explain", "out/final"]) == 2
    assert "Give an --image, a --text or both" in capsys.readouterr().err
    assert main(["explain", "out/final", "--image", "photograph.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("st_btok: the file 'photograph.png' is not an image") and error.count("\n") == 1
    with pytest.raises(ValueError, match="is not an image"):
        main(["explain", "out/final", "--image", "photograph.png", "--traceback"])

    def fails_inside(*args, **kwargs):
        int("no number")

    monkeypatch.setattr("st_btok.tools.convert.convert", fails_inside)
    with pytest.raises(ValueError, match="no number"):  # raised here in the test, so it is nobody's message to a user
        main(["convert", "out", "dst"])

    def not_on_the_hub(*args, **kwargs):
        raise OSError("no model\nof this name")

    monkeypatch.setattr("st_btok.tools.convert.convert", not_on_the_hub)
    assert main(["convert", "out", "dst"]) == 2
    assert capsys.readouterr().err == "st_btok: no model of this name\n"

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("st_btok.tools.convert.convert", stopped)
    assert main(["convert", "out", "dst"]) == 130
    assert capsys.readouterr().err == "\nst_btok: stopped\n"
