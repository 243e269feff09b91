"""Real pairs that every Debian or Ubuntu machine holds: the title of a package and its long description.

    mkdir -p lists/partial && apt-get update -o Acquire::Languages=en -o Dir::State::lists=$PWD/lists
    python -m recipes.data.debian_packages --lists lists --size 600 --output pairs.jsonl

Written by the packages' maintainers. Packages of one source share much of their text ("this package contains the
documentation"), so one package is taken per source, and every description once.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
from pathlib import Path

_LENGTH = 160  # characters of the description: its first sentence or two say what the package is


def read_packages(text: str) -> list[tuple[str, str]]:
    """Titles and descriptions from the output of `apt-cache show`, one package per source.

    Args:
        text: Paragraphs of `Field: value`, with continued lines indented.

    Returns:
        Pairs in the order of the text.
    """
    found: dict[str, tuple[str, str]] = {}
    for record in text.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*(?:\n .*)*)", record, re.MULTILINE))
        title, _, description = fields.get("Description-en", "").partition("\n")
        words = re.sub(r"\s+\.?\s*", " ", description).strip()
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        if len(words) > 100:
            found.setdefault(source, (title, words[:_LENGTH]))
    return list({description: (title, description) for title, description in found.values()}.values())


def main() -> None:
    """Write pairs drawn at random as JSONL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=600, help="pairs (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="which are drawn (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("pairs.jsonl"), help="default: pairs.jsonl")
    parser.add_argument("--lists", type=Path, help="package lists (default: the system's)")
    arguments = parser.parse_args()
    apt = ["apt-cache", "-o", "Acquire::Languages=en"]
    if arguments.lists:
        apt += ["-o", f"Dir::State::lists={arguments.lists.resolve()}"]
    names = subprocess.run([*apt, "pkgnames"], capture_output=True, text=True, check=True).stdout.split()
    chosen = random.Random(arguments.seed).sample(sorted(names), min(len(names), 20 * arguments.size))
    # In the order of the packed lists, which apt would unpack anew for every step back; then in the order drawn.
    shown = subprocess.run([*apt, "show", *sorted(chosen)], capture_output=True, text=True, check=False).stdout
    place = {f"Package: {name}": number for number, name in enumerate(chosen)}
    records = [record for record in shown.split("\n\n") if record.split("\n")[0] in place]
    records.sort(key=lambda record: place[record.split("\n")[0]])
    pairs = read_packages("\n\n".join(records))[: arguments.size]
    rows = [json.dumps({"query": title, "positive": description}) for title, description in pairs]
    arguments.output.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pairs in {arguments.output}")


if __name__ == "__main__":
    main()
