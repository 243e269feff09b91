"""Search one's own files.

    python -m recipes.search index FOLDER_OR_CORPUS --model MODEL --to INDEX
    python -m recipes.search query INDEX "a query" --model MODEL         (or --image picture.png)
    python -m recipes.search serve INDEX --model MODEL                   (a page in the browser)

Texts, images, PDF pages and videos of a folder become rows of a LanceDB table; `index` again brings it up to date and
embeds only what is new or changed. Needs the extra `search`: pip install -e '.[search]' in the checkout.
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
    raise SystemExit(f"searching needs an extra, in the checkout: pip install -e '.[search]' ({error})") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m recipes.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True)
    add = commands.add_parser("index", help="make an index of a folder, or bring it up to date")
    add.add_argument("folder", type=Path, help="folder of texts, images, PDF files and videos, or a table of them")
    add.add_argument("--to", type=Path, required=True, help="folder of the index")
    add.add_argument("--batch_size", type=int, default=32, help="items in a forward pass (default 32)")
    add.add_argument("--half", action="store_true", help="store float16: half the size")
    add.add_argument(
        "--index_above", type=int, default=100_000, help="rows above which searches are approximate (default 100,000)"
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
    show.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that the page is reached by, beside localhost and this machine's own",
    )
    for command in (add, query, show):
        command.add_argument("--model", required=True, help="name or path of a SentenceTransformer, ever the same")
        command.add_argument("--truncate_dim", type=int, help="keep only so many dimensions of each embedding")
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
                print(report_text(report, store.count(), lookup.spread(store)))
            return
        store, folder = index.open_index(options.index, model)
        if options.command == "query":
            value = lookup.query_of(options.text, options.image)
            hits = lookup.find(store, model, value, options.limit, options.kind, options.below)
            for hit in hits:
                print(json.dumps(lookup.shown(hit)) if options.json else lookup.line(hit))
            random = lookup.spread(store)
            if random is not None and hits and hits[0].score <= random.high and not options.json:
                print(f"(no hit is closer than random items of the index are to each other, {random.high:.3f})")
            return
    except ValueError as error:
        raise SystemExit(str(error)) from error
    serve(store, model, folder, options.host, options.port, options.allowed_hosts)


def report_text(report: index.Report, rows: int, random: lookup.Spread | None = None) -> str:
    """What `index` says at the end.

    Args:
        report: What the run did.
        rows: Rows of the index.
        random: Similarities of random pairs.

    Returns:
        Lines.
    """
    counts = ", ".join(f"{getattr(report, name):,} {name}" for name in ("new", "changed", "deleted", "unchanged"))
    lines = [f"{counts} files; {rows:,} items"]
    if report.suffixes:
        kinds = ", ".join(
            f"{number:,} {suffix or 'without suffix'}" for suffix, number in report.suffixes.most_common()
        )
        lines.append(f"{report.suffixes.total():,} files of kinds that can't be searched: {kinds}")
    lines += [f"left out: {path}: {reason}" for path, reason in report.left_out.items()]
    if report.recall is not None:
        lines.append(f"approximate search finds {report.recall:.1%} of the ten nearest rows")
    if random is not None and random.warning:
        lines.append(random.warning)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
