"""The console script `st-btok`: one light file that knows every command's arguments, and nothing heavy.

Each command is a function here that describes its arguments (the docstring is its help), and a `main` with the same
names as keyword arguments in the module that does the work. That module is imported after parsing: torch and
transformers take ten seconds to load, and `--help`, a mistyped option or a file that is not there should not wait for
them. What is wrong with what was given is one line, `st_btok: ...`. A new command is a function and a line in
`COMMANDS`.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from st_btok.tools import given
from st_btok.version import __version__


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest command or option; `parts` are those of its commands."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parts: list[argparse.ArgumentParser] = []

    def error(self, message: str) -> NoReturn:
        words = message.split()
        if message.startswith("unrecognized arguments"):
            parsers = [self, *self.parts]
            known = [name for parser in parsers for name in re.findall(r"--[a-z][\w-]*", parser.format_help())]
            near = [given.near_word(word.partition("=")[0], known) for word in words if word.startswith("--")]
            message += "".join(near)
        elif "invalid choice" in message:
            seen, _, rest = message.partition("invalid choice: ")[2].partition(" (choose from ")
            message += given.near_word(seen.strip("'"), [word.strip("',)") for word in rest.split()])
        message = message if message.endswith(("?", ".")) else f"{message}."
        self.exit(2, f"st_btok: {message} `{self.prog} --help` lists what can be given.\n")


def check(parser: argparse.ArgumentParser) -> None:
    """Measure what holds for a backbone: one verdict a line, exit status 1 if one fails."""
    parser.add_argument(
        "backbone", type=given.model, help="hub name or path of a language model, or of a finished BTok model"
    )
    parser.add_argument("--template", choices=("chat", "plain"), default="chat", help="layout (default: chat)")
    pixels = "largest image area in pixels; fewer are faster"
    parser.add_argument("--max_pixels", "--max-pixels", type=int, help=pixels)
    parser.add_argument("--gguf_file", "--gguf-file", help="name of the .gguf file inside the path")
    parser.add_argument("--json", type=given.new_file, help="also write the verdicts to this file")
    parser.set_defaults(opening=lambda options: given.duration(options["backbone"]))


def convert(parser: argparse.ArgumentParser) -> None:
    """Turn a checkpoint of the authors' release into a plain sentence-transformers checkpoint."""
    parser.add_argument("src", type=given.folder, help="directory of a full checkpoint, or of a LoRA or DoRA adapter")
    parser.add_argument("dst", help="directory to write; must not exist, or be empty")
    parser.add_argument("--base", help="base model directory or backbone, where the paths in SRC are no longer valid")


def explain(parser: argparse.ArgumentParser) -> None:
    """Draw where the bottleneck tokens look, and write what they alone can generate."""
    parser.add_argument("model", type=given.model, help="path or hub name of a BTok model")
    parser.add_argument("--image", type=given.file, help="path of an image")
    parser.add_argument("--text", help="text, alone or beside the image")
    parser.add_argument("--prompt", help="instruction of the input")
    parser.add_argument(
        "--out", type=given.new_file, default="explain.png", help="PNG to write (default: explain.png)"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="layers to average over, -1 is the last (default: all)")
    parser.add_argument("--beams", type=int, default=1, help="hypotheses of the generated text (default: 1, greedy)")


def serve_check(parser: argparse.ArgumentParser) -> None:
    """Compare an OpenAI-compatible server with sentence-transformers, in every form of request."""
    parser.add_argument("url", help="root of the server, such as http://localhost:8000")
    parser.add_argument(
        "--model", type=given.model, required=True, help="path or hub name of the model that it serves"
    )
    parser.add_argument("--name", help="the served model's name (default: the first that the server lists)")
    parser.add_argument(
        "--bound", type=float, default=1e-4, help="largest difference that counts as equal (default: 1e-4, float32)"
    )
    parser.add_argument("--json", type=given.new_file, help="also write the answers to this file")


def export(parser: argparse.ArgumentParser) -> None:
    """Write the text pipeline as one graph for ONNX Runtime or OpenVINO."""
    parser.add_argument("target", choices=("onnx", "openvino"), help="format of the graph")
    parser.add_argument("model", type=given.model, help="path or hub name of a BTok model")
    parser.add_argument("out", help="directory to write; must not exist, or be empty")


# Name of a command: its arguments, and the module whose `main` takes them.
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "check": (check, "st_btok.tools.check"),
    "convert": (convert, "st_btok.tools.convert"),
    "explain": (explain, "st_btok.tools.explain_figure"),
    "export": (export, "st_btok.serving.export"),
    "serve-check": (serve_check, "st_btok.serving.serve_check"),
}


def parser_of_all() -> argparse.ArgumentParser:
    """The parser of `st-btok`; its result holds the command's name as `command`, beside its arguments."""
    parser = _Parser(
        prog="st-btok",
        description="Bottleneck-token embeddings: tools around a model. To train one: python -m recipes.train, in "
        "the checkout.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"st_btok {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (describe, _) in COMMANDS.items():
        summary = (describe.__doc__ or "").strip()
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        describe(command)
        parser.parts.append(command)
        command.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command with the process' own arguments, or these; returns the exit status.

    An error that this package raises on purpose, and any of the file system or the hub, becomes one line and the
    status 2, unless `--traceback` is given; any other keeps its traceback, which a report of a bug needs. Ctrl-C is
    130.
    """
    options = vars(parser_of_all().parse_args(arguments))
    name, traced = options.pop("command"), options.pop("traceback")
    opening = options.pop("opening", None)  # what a command says before it imports anything
    try:
        if opening:
            sys.stdout.write(f"{opening(options)}\n")
            sys.stdout.flush()
        return import_module(COMMANDS[name][1]).main(**options)
    except KeyboardInterrupt:
        sys.stderr.write("\nst_btok: stopped\n")
        return 130
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if traced or not (isinstance(error, OSError) or _raised_by_us(error)):
            raise
        missing = str(options.get("model") or options.get("backbone") or "") if isinstance(error, OSError) else ""
        hint = given.near_path(missing) if missing else ""
        sys.stderr.write(f"st_btok: {' '.join(str(error).split())}{hint}\n")
        return 2


def _raised_by_us(error: BaseException) -> bool:
    """Whether the line that raised is one of this package, so that the message was written for the user."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("st_btok.")


if __name__ == "__main__":
    sys.exit(main())
