"""What `python -m recipes.search` does once its flags are read."""

from __future__ import annotations

import json
from argparse import Namespace

from sentence_transformers import SentenceTransformer

try:
    from recipes.search import index, lookup
    from recipes.search.page import build_page, launch
except ImportError as error:
    raise ImportError(f"searching needs an extra, in the checkout: pip install -e '.[search]' ({error})") from error


def main(options: Namespace) -> None:
    """Run one command."""
    model = SentenceTransformer(options.model, truncate_dim=options.truncate_dim)
    if options.command == "index":
        with index.one_writer(options.to):
            store, folder = index.open_index(options.to, model, options.folder, options.half)
            sizes = {"batch_size": options.batch_size, "index_above": options.index_above}
            report = index.update(store, model, folder, **sizes)
            print(report_text(report, store.count(), lookup.spread(store)))
        return
    store, folder = index.open_index(options.index, model)
    if options.command == "serve":
        page = build_page(store, model, folder)
        launch(page, options.host, options.port, allowed_hosts=options.allowed_hosts)
        return
    value = lookup.query_of(options.text, options.image)
    hits = lookup.find(store, model, value, options.limit, options.kind, options.below)
    for hit in hits:
        print(json.dumps(lookup.shown(hit)) if options.json else lookup.line(hit))
    random = lookup.spread(store)
    if random is not None and hits and hits[0].score <= random.high and not options.json:
        print(f"(no hit is closer than random items of the index are to each other, {random.high:.3f})")


def report_text(report: index.Report, rows: int, random: lookup.Spread | None = None) -> str:
    """What `index` says at the end: what the run did, the rows of the index, and how alike random items are."""
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
