"""Search one's own files.

    python -m recipes.search index FOLDER_OR_CORPUS --model MODEL --to INDEX
    python -m recipes.search query INDEX "a query" --model MODEL         (or --image picture.png)
    python -m recipes.search serve INDEX --model MODEL                   (a page in the browser)

Texts, images, PDF pages and videos of a folder become rows of a LanceDB table; `index` again brings it up to date and
embeds only what is new or changed. Needs the extra `search`: pip install 'st_btok[search]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

try:
    from recipes.search import index, lookup
    from recipes.search.page import serve
except ImportError as error:
    raise SystemExit(f"searching needs an extra of this package: pip install 'st_btok[search]' ({error})") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m recipes.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True)
    add = commands.add_parser("index", help="make an index of a folder, or bring it up to date")
    add.add_argument("folder", type=Path, help="folder of texts, images, PDF files and videos, or a corpus (.jsonl)")
    add.add_argument("--to", type=Path, required=True, help="folder of the index")
    add.add_argument("--batch-size", type=int, default=32, help="items in a forward pass (default 32)")
    add.add_argument("--half", action="store_true", help="store float16: half the size")
    add.add_argument(
        "--index-above", type=int, default=100_000, help="rows above which searches are approximate (default 100,000)"
    )
    query = commands.add_parser("query", help="print the nearest items")
    query.add_argument("index", type=Path, help="folder of the index")
    query.add_argument("text", nargs="?", help="what to search for")
    query.add_argument("--image", type=Path, help="a picture to search with, alone or beside the text")
    query.add_argument("--limit", type=int, default=10, help="number of hits (default 10)")
    query.add_argument("--kind", nargs="+", default=[], help="only text, image, page or video")
    query.add_argument("--below", default="", help="only paths that start with this")
    query.add_argument("--json", action="store_true", help="print JSON lines")
    show = commands.add_parser("serve", help="open a search page in the browser")
    show.add_argument("index", type=Path, help="folder of the index")
    show.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    show.add_argument("--port", type=int, default=7860, help="port (default 7860)")
    for command in (add, query, show):
        command.add_argument("--model", required=True, help="name or path of a SentenceTransformer, ever the same")
        command.add_argument("--truncate-dim", type=int, help="keep only so many dimensions of each embedding")
    return root


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    options = parser().parse_args(arguments)
    if options.command == "query" and not options.text and not options.image:
        raise SystemExit("give a text, an --image or both")
    model = SentenceTransformer(options.model, truncate_dim=options.truncate_dim)
    try:
        if options.command == "index":
            with index.one_writer(options.to):
                store, folder = index.open_index(options.to, model, options.folder, options.half)
                report = index.update(
                    store, model, folder, batch_size=options.batch_size, index_above=options.index_above
                )
                print(report_text(report, store.count()))
            return
        store, folder = index.open_index(options.index, model)
        if options.command == "query":
            value = lookup.query_of(options.text, options.image)
            hits = lookup.find(store, model, value, options.limit, options.kind, options.below)
            for hit in hits:
                print(json.dumps(lookup.shown(hit)) if options.json else lookup.line(hit))
            return
    except ValueError as error:
        raise SystemExit(str(error)) from error
    serve(store, model, folder, options.host, options.port)


def report_text(report: object, rows: int) -> str:
    """What `index` says at the end."""
    counts = ", ".join(f"{getattr(report, name)} {name}" for name in ("new", "changed", "deleted", "unchanged"))
    lines = [f"{counts} files; {rows} rows"]
    lines += [f"left out: {path}: {reason}" for path, reason in report.left_out.items()]
    if report.recall is not None:
        lines.append(f"approximate search finds {report.recall:.1%} of the ten nearest rows")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
