"""Pairs that nobody here wrote, out of Debian packages: pictures and captions, words and meanings, headings and pages.

Packages are downloaded with `apt-get download` and unpacked with `dpkg-deb -x` into a cache folder, without root.
Where there is no apt, unpack them elsewhere into `CACHE/<package>` and everything here works the same.

| corpus | query | positive | package, licence |
|---|---|---|---|
| `clipart` | drawing | title and keywords | openclipart-svg, public domain |
| `stamps` | photograph or drawing | English caption | tuxpaint-stamps-default, public domain and GPL |
| `emoji` | emoji | its name in Unicode | fonts-noto-color-emoji, SIL Open Font License 1.1 |
| `languages` | German caption of a stamp | English caption | the same |
| `words` | word | its meaning | wordnet-base, WordNet licence |
| `packages` | title of a package | first paragraph of its description | apt's own lists |
| `descriptions` | title of a package | its whole description, of 400 to 1,000 characters | the same |
| `pages` | heading of a section | the section as a page image | debian-handbook, GPL and CC BY-SA |
"""

from __future__ import annotations

import html
import io
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SIDE = 224  # longest side of a picture, in pixels
PAGE = (448, 588)  # a page: width and height, in pixels
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@dataclass(frozen=True)
class RealPair:
    """One pair: a text or a picture, and the text or picture that answers it."""

    query: str | Image.Image
    positive: str | Image.Image


def package_folder(package: str, cache: Path) -> Path:
    """The folder that holds what a package installs, `usr/...`; fetched into `cache` if it is not there.

    Raises:
        FileNotFoundError: If it is neither there nor to be had.
    """
    folder = cache / package
    if folder.exists():
        return folder
    missing = FileNotFoundError(
        f"the package {package} must lie unpacked in {folder}: fetch it on a machine with Debian's packages "
        f"(apt-get download {package} && dpkg-deb -x {package}_*.deb {package}) and put the folder there."
    )
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise missing
    download = cache / f"{package}.download"
    download.mkdir(parents=True, exist_ok=True)
    fetched = subprocess.run(["apt-get", "download", package], cwd=download, capture_output=True, text=True)
    files = sorted(download.glob("*.deb"))
    if fetched.returncode or not files:
        reason = fetched.stderr.strip().splitlines()
        raise FileNotFoundError(f"{missing} apt-get said: {reason[-1] if reason else 'nothing'} (apt-get update?)")
    unpacked = cache / f"{package}.unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    subprocess.run(["dpkg-deb", "-x", str(files[0]), str(unpacked)], check=True)
    unpacked.rename(folder)  # last, so that a folder of this name is always whole
    shutil.rmtree(download)
    return folder


def clipart(cache: Path) -> Iterator[RealPair]:
    """Drawings with their titles and keywords."""
    root = package_folder("openclipart-svg", cache)
    for path in sorted(root.rglob("*.svg")):
        caption = _svg_caption(path)
        picture = draw_svg(path) if caption else None
        if picture is not None:
            yield RealPair(picture, caption)


def stamps(cache: Path) -> Iterator[RealPair]:
    """Pictures of stamps with their English captions."""
    for path, captions in _stamp_captions(cache):
        picture = _stamp(path)
        if picture is not None:
            yield RealPair(picture, captions["en"])


def emoji(cache: Path) -> Iterator[RealPair]:
    """Emoji of one code point with their names; letters, digits and colours of skin are no pictures."""
    from fontTools.ttLib import TTFont

    root = package_folder("fonts-noto-color-emoji", cache)
    font = TTFont(next(root.rglob("NotoColorEmoji.ttf")), lazy=True)
    bitmaps = font["CBDT"].strikeData[0]
    for code, glyph in sorted(font.getBestCmap().items()):
        name = unicodedata.name(chr(code), "")
        if glyph in bitmaps and unicodedata.category(chr(code)) == "So" and name and "REGIONAL" not in name:
            yield RealPair(on_white(Image.open(io.BytesIO(bitmaps[glyph].imageData))), name.lower())


def languages(cache: Path) -> Iterator[RealPair]:
    """German captions with the English ones of the same stamps."""
    for _, captions in _stamp_captions(cache):
        if "de" in captions:
            yield RealPair(captions["de"], captions["en"])


def words(cache: Path) -> Iterator[RealPair]:
    """Words with their meanings: the first word of each group of synonyms, and its gloss without examples."""
    root = package_folder("wordnet-base", cache)
    for name in ("noun", "verb", "adj", "adv"):
        for line in (root / "usr/share/wordnet" / f"data.{name}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence stands above the data
                continue
            fields, _, gloss = line.partition(" | ")
            word = re.sub(r"\(\w+\)$", "", fields.split(" ")[4]).replace("_", " ")
            meaning = gloss.split('; "')[0].strip()
            if meaning:
                yield RealPair(word, meaning)


def packages(cache: Path) -> Iterator[RealPair]:
    """Titles of packages with the first paragraphs of their descriptions."""
    for title, description in _package_descriptions(cache):
        yield RealPair(title, " ".join(description.split("\n .\n")[0].split()))


def descriptions(cache: Path) -> Iterator[RealPair]:
    """Titles of packages with their whole descriptions, about 100 to 250 tokens long."""
    for title, description in _package_descriptions(cache):
        text = " ".join(description.replace("\n .\n", "\n").split())
        if 400 <= len(text) <= 1000:
            yield RealPair(title, text)


def pages(cache: Path) -> Iterator[RealPair]:
    """Headings with pages on which the section below them is printed (the heading itself is not)."""
    root = package_folder("debian-handbook", cache)
    for path in sorted((root / "usr/share/doc/debian-handbook/html/en-US").glob("*.html")):
        text = path.read_text(encoding="utf-8", errors="replace")
        parts = re.split(r"<h[2-4][^>]*>(.*?)</h[2-4]>", text, flags=re.DOTALL)
        for heading, body in zip(parts[1::2], parts[2::2], strict=True):
            title = re.sub(r"^[\d.]+\s*", "", _plain(heading))
            passage = _plain(body)
            if len(title) > 3 and len(passage) > 200:
                yield RealPair(title, draw_page(passage))


CORPORA: dict[str, Callable[[Path], Iterator[RealPair]]] = {
    "clipart": clipart,
    "stamps": stamps,
    "emoji": emoji,
    "languages": languages,
    "words": words,
    "packages": packages,
    "descriptions": descriptions,
    "pages": pages,
}


def draw_svg(path: Path) -> Image.Image | None:
    """A drawing on white, its longest side 224 px; None for a file that can't be drawn."""
    import resvg_py

    fonts = {
        "skip_system_fonts": True,  # the split of a corpus must not depend on what else a machine has installed
        "font_files": [str(file) for file in sorted(FONTS.glob("DejaVu*.ttf"))],
    }
    try:
        # Without dpi, points and millimetres are nothing.
        drawn: Any = resvg_py.svg_to_bytes(svg_path=str(path), width=SIDE, dpi=96, **fonts)
        return on_white(Image.open(io.BytesIO(bytes(drawn))))
    except Exception:  # whatever the drawing library raises: one file of thousands
        return None


def on_white(picture: Image.Image) -> Image.Image:
    """A picture without transparency, its longest side at most 224 px."""
    picture = picture.convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture)
    flat = paper.convert("RGB")
    flat.thumbnail((SIDE, SIDE))
    return flat


def draw_page(text: str) -> Image.Image:
    """A page that holds as much of a text as fits."""
    font = ImageFont.truetype(str(FONTS / "DejaVuSans.ttf"), 13)
    width, height, margin, step = *PAGE, 14, 18
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}") > width - 2 * margin:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    page = Image.new("RGB", PAGE, "white")
    shown = lines[: (height - 2 * margin) // step]
    ImageDraw.Draw(page).multiline_text((margin, margin), "\n".join(shown), fill="black", font=font, spacing=4)
    return page


def _svg_caption(path: Path) -> str:
    """Title and keywords of a drawing; empty if it has no title."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError:
        return ""
    dublin = "{http://purl.org/dc/elements/1.1/}"
    title = (root.findtext(f".//{dublin}title") or "").strip()
    if not title or title.lower() in ("untitled", "unnamed"):
        return ""
    keywords = [
        (item.text or "").strip() for item in root.iterfind(f".//{dublin}subject//*") if (item.text or "").strip()
    ]
    return f"{title}: {', '.join(keywords)}" if keywords else title


def _stamp_captions(cache: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Path of a stamp without its suffix, and captions by language."""
    root = package_folder("tuxpaint-stamps-default", cache)
    for path in sorted(root.rglob("*.txt")):
        if "stamps" not in path.parts:
            continue
        first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
        captions = {"en": first.strip()}
        for line in others:
            language, _, text = line.partition(".utf8=")
            captions[language] = text.strip()
        if captions["en"]:
            yield path.with_suffix(""), captions


def _package_descriptions(cache: Path) -> Iterator[tuple[str, str]]:
    """Title and description of every package, from lists of our own (no root needed)."""
    lists = cache / "lists"
    if not any(lists.glob("*Translation-en*")):
        if shutil.which("apt-get") is None:
            raise FileNotFoundError(
                f"put the file Translation-en of a Debian release into {lists}; there is no apt-get"
            )
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = [
            f"Dir::State::lists={lists.resolve()}",
            "Acquire::Languages=en",
            f"Dir::Cache={cache.resolve()}/apt",
        ]
        command = ["apt-get", *(part for option in options for part in ("-o", option)), "update"]
        (cache / "apt" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, capture_output=True)
    for path in sorted(lists.glob("*Translation-en*")):
        # apt keeps its lists packed; its own helper reads every form.
        text = subprocess.run(
            ["/usr/lib/apt/apt-helper", "cat-file", str(path)], check=True, capture_output=True
        ).stdout
        for block in text.decode("utf-8", errors="replace").split("\n\n"):
            found = re.search(r"^Description-en: (.*)\n((?: .*\n?)+)", block, re.MULTILINE)
            if found:
                yield found[1].strip(), found[2]


def _stamp(path: Path) -> Image.Image | None:
    if path.with_suffix(".png").exists():
        return on_white(Image.open(path.with_suffix(".png")))
    return draw_svg(path.with_suffix(".svg")) if path.with_suffix(".svg").exists() else None


def _plain(markup: str) -> str:
    """The text of a piece of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())
