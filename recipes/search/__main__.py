"""Search one's own files.

    python -m recipes.search index FOLDER_OR_CORPUS --model MODEL --to INDEX
    python -m recipes.search query INDEX "a query" --model MODEL         (or --image picture.png)
    python -m recipes.search serve INDEX --model MODEL                   (a page in the browser)

Texts, images, PDF pages and videos of a folder become rows of a LanceDB table; `index` again brings it up to date and
embeds only what is new or changed. Needs the extra `search`: pip install -e '.[search]' in the checkout.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from recipes.command_line import ArgumentDefaultsRawHelp, CommandParser, run


def index(parser: CommandParser) -> None:
    """Make an index of a folder, or bring it up to date."""
    parser.add_argument("folder", type=Path, help="folder of texts, images, PDF files and videos, or a table of them")
    parser.add_argument("--to", "--output_dir", type=Path, required=True, help="folder of the index")
    parser.add_argument("--batch_size", type=int, default=32, help="items in a forward pass")
    parser.add_argument("--half", action="store_true", help="store float16: half the size")
    parser.add_argument("--index_above", type=int, default=100_000, help="rows above which searches are approximate")


def query(parser: CommandParser) -> None:
    """Print the nearest items."""
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("text", nargs="?", help="what to search for")
    parser.add_argument("--image", type=Path, help="a picture to search with, alone or beside the text")
    parser.add_argument("--limit", type=int, default=10, help="number of hits")
    parser.add_argument("--kind", nargs="+", default=[], help="only text, image, page or video")
    parser.add_argument("--below", default="", help="only paths that start with this")
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def serve(parser: CommandParser) -> None:
    """Open a search page in the browser."""
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine only")
    parser.add_argument("--port", type=int, default=7860, help="port")
    names = "names that the page is reached by, beside localhost and this machine's own"
    parser.add_argument("--allowed_hosts", nargs="+", default=[], metavar="NAME", help=names)


COMMANDS = {command.__name__: command for command in (index, query, serve)}


def parse(arguments: Sequence[str]) -> Namespace:
    """What the command line gives; the name of the command is `command`."""
    layout = {"formatter_class": ArgumentDefaultsRawHelp}
    root = CommandParser(prog="python -m recipes.search", description=__doc__, **layout)
    root.add_argument("command", choices=COMMANDS, help="--help behind it lists its flags")
    name = root.parse_args(arguments[:1]).command
    describe = COMMANDS[name]
    parser = CommandParser(prog=f"{root.prog} {name}", description=describe.__doc__, **layout)
    describe(parser)
    parser.add_argument("--model", required=True, help="name or path of a SentenceTransformer, ever the same")
    parser.add_argument("--truncate_dim", type=int, help="keep only so many dimensions of each embedding")
    options = parser.parse_args(arguments[1:], Namespace(command=name))
    if name == "query" and not options.text and not options.image:
        parser.error("give a text, an --image or both")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    run(lambda: import_module("recipes.search.commands").main(options))


if __name__ == "__main__":
    main()
