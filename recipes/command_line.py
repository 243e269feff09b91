"""The command lines of the recipes: settings as flags, read before torch is imported, and errors of one line.

A command is a module with light imports: its settings and a `main` that parses them, which takes a second, and only
then imports what does the work, which takes many. `python -m recipes.train --help` and a mistyped flag are
answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

Settings = TypeVar("Settings")
TRACEBACK = "--traceback"
# Which extra of pyproject.toml brings a package that a command needs.
_EXTRAS = {
    **dict.fromkeys(("matplotlib", "qtawesome"), "train"),
    **dict.fromkeys(("mteb", "open_clip", "sklearn"), "eval"),
    **dict.fromkeys(("lancedb", "gradio", "qdrant_client"), "search"),
    "ray": "ray",
    "resvg_py": "real",
}
_OURS = ("recipes.", "evaluation.", "st_btok.", "__main__")


def option(default: Any, text: str, *aliases: str) -> Any:
    """A setting: its default, its line of help, and further names of its flag."""
    make: dict[str, Any] = {"default": default}
    if isinstance(default, list | dict):
        make = {"default_factory": default.copy}
    return field(metadata={"help": text, **({"aliases": list(aliases)} if aliases else {})}, **make)


def required(text: str, *aliases: str) -> Any:
    """A setting that has to be given."""
    return field(metadata={"help": text, **({"aliases": list(aliases)} if aliases else {})})


class ArgumentDefaultsRawHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description and shows the defaults."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors end the process with one line, which names the nearest flag."""

    def __init__(self, *settings: Any, **options: Any) -> None:
        super().__init__(*settings, allow_abbrev=False, **options)
        self.add_argument(TRACEBACK, action="store_true", help="show where an error was raised")

    def error(self, message: str) -> NoReturn:
        """End the process with one line."""
        if message.startswith("unrecognized arguments"):
            for word in message.split():
                near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
                message += f" (did you mean {near[0]}?)" if near and word.startswith("--") else ""
        message = message if message.endswith(("?", ".")) else f"{message}."
        self.exit(2, f"st_btok: {message} --help lists all flags.\n")


class Parser(CommandParser, HfArgumentParser):
    """Reads dataclasses of settings."""

    def settings(self, cls: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
        """What the command line gives; a `ValueError` of the settings ends the process with its message."""
        given = vars(self.parse_args(arguments))
        traced = given.pop(TRACEBACK.strip("-"))
        try:
            return cls(**given)
        except ValueError as error:
            if traced:
                raise
            self.error(str(error))


def parse(cls: type[Settings], arguments: Sequence[str] | None = None, description: str | None = None) -> Settings:
    """The settings that a command line gives.

    Args:
        cls: A dataclass whose fields are the flags.
        arguments: Words of the command line; by default the process's.
        description: What `--help` says first; by default the docstring of the dataclass.

    Returns:
        The settings.
    """
    raw = {"formatter_class": ArgumentDefaultsRawHelp} if description else {}
    return Parser(cls, description=description or cls.__doc__, **raw).settings(cls, arguments)


def run(command: Callable[[], object]) -> None:
    """Run a command; what went wrong with what it was given is one line on the terminal.

    Errors that our code raises on purpose, files that are missing and hubs that don't answer become `st_btok: ...`;
    `--traceback` shows where they were raised. Any other error keeps its traceback, which a report of a bug needs.
    """
    try:
        command()
    except KeyboardInterrupt as stop:
        sys.exit(f"\nst_btok: {stop or 'stopped'}")
    except Exception as error:
        if TRACEBACK in sys.argv or not is_for_the_user(error):
            raise
        extra = _EXTRAS.get(str(getattr(error, "name", "")).partition(".")[0])
        hint = f" It comes with an extra, in the checkout: pip install -e '.[{extra}]'" if extra else ""
        sys.exit(f"st_btok: {' '.join(str(error).split())}{'.' * bool(extra)}{hint}")


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error's message was written for who runs the command: raised by our code, or by the file system."""
    if isinstance(error, OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = f"{frame.f_globals.get('__name__', '')}.".startswith(_OURS)
    return ours and isinstance(error, ValueError | ImportError | RuntimeError)
