"""Real corpora: small files in the packages' own forms, read as the packages are; splits without near-duplicates."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

from recipes.data import debian, real
from recipes.data.debian import RealPair
from recipes.data.user_data import load_user_data
from tests.backbones import picture

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">
<metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work><dc:title>{title}</dc:title>
<dc:subject><rdf:Bag><rdf:li>sky</rdf:li><rdf:li>blue</rdf:li></rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata>
<rect width="20" height="20" fill="#0000ff"/></svg>"""


@pytest.fixture
def cache(tmp_path):
    stamps = tmp_path / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps/animals"
    stamps.mkdir(parents=True)
    for number in range(30):
        (stamps / f"s{number:02}.txt").write_text(
            f"Animal {'abcdefghij'[number % 10] * (number // 10 + 1)}.\nde.utf8=Tier Ä{number}.\n"
        )
        picture(56, 56, number).save(stamps / f"s{number:02}.png")
    (stamps / "nothing.txt").write_text("A caption without a picture.\n")
    art = tmp_path / "openclipart-svg/usr/share/openclipart/svg"
    art.mkdir(parents=True)
    (art / "a.svg").write_text(SVG.format(title="Half sky"))
    (art / "broken.svg").write_text("<svg")
    (art / "untitled.svg").write_text(SVG.format(title=""))
    words = tmp_path / "wordnet-base/usr/share/wordnet"
    words.mkdir(parents=True)
    line = '00001740 03 n 01 living_thing 0 000 | a thing that lives; "the cat is a living thing"  \n'
    for name in ("noun", "verb", "adj", "adv"):
        (words / f"data.{name}").write_text("  1 This software ...\n" + (line if name == "noun" else ""))
    book = tmp_path / "debian-handbook/usr/share/doc/debian-handbook/html/en-US"
    book.mkdir(parents=True)
    (book / "a.html").write_text(
        f"<html><h2 class='t'>1.2. The &amp; sign</h2><p>{'A long section. ' * 20}</p></html>"
    )
    return tmp_path


def test_each_package_is_read_in_its_own_form(cache):
    (drawing,) = debian.clipart(cache)
    assert drawing.positive == "Half sky: sky, blue" and drawing.query.size == (224, 112)
    assert drawing.query.getpixel((10, 10)) == (0, 0, 255) and drawing.query.getpixel((200, 10)) == (255, 255, 255)
    stamps = list(debian.stamps(cache))
    assert len(stamps) == 30 and stamps[0].positive == "Animal a."
    np.testing.assert_array_equal(np.asarray(stamps[3].query), np.asarray(picture(56, 56, 3)))
    assert next(debian.languages(cache)) == RealPair("Tier Ä0.", "Animal a.")
    assert list(debian.words(cache)) == [RealPair("living thing", "a thing that lives")]
    (page,) = debian.pages(cache)
    assert page.query == "The & sign" and page.positive.size == debian.PAGE and np.asarray(page.positive).min() < 50


@pytest.mark.parametrize("unit", ["pt", "mm", "px"])
def test_drawings_in_every_unit_are_drawn(tmp_path, unit):
    path = tmp_path / "a.svg"
    path.write_text(SVG.format(title="Half sky").replace('"40" height="20"', f'"40{unit}" height="20{unit}"', 1))
    drawing = debian.draw_svg(path)
    assert drawing is not None and drawing.size[0] == 224 and abs(drawing.size[1] - 112) <= 4  # in whole pixels


def test_the_fonts_of_a_machine_change_no_drawing(tmp_path):
    """Two stamps went to other splits once a browser had brought fonts along."""
    pytest.importorskip("resvg_py", reason="the extra `real` draws clip art")
    found = {font_manager.get_font(path).family_name for path in font_manager.findSystemFonts()}
    drawn = {}
    for name in ("DejaVu Sans", *(name for name in found if not name.startswith("DejaVu"))):
        text = f'<text x="2" y="30" font-family="{name}" font-size="24">words</text>'
        (tmp_path / "a.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="40">{text}</svg>')
        drawn[name] = debian.draw_svg(tmp_path / "a.svg").convert("L").getextrema()[0] < 128
    assert drawn == {name: name == "DejaVu Sans" for name in drawn}


def test_a_package_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="wordnet-base must lie unpacked in .*dpkg-deb -x"):
        next(debian.words(tmp_path))


def test_nearly_equal_texts_and_pictures_share_a_group():
    noisy = np.asarray(picture(56, 56, 1)).astype(int)
    noisy = Image.fromarray((noisy * 0.97).astype(np.uint8))
    pairs = [
        RealPair(picture(56, 56, 1), "A frog."),
        RealPair(noisy, "Something else"),  # the picture of the first, darker
        RealPair(picture(56, 56, 2), "a FROG"),  # the text of the first
        RealPair(picture(56, 56, 3), "a toad"),
        RealPair("eine Kröte", "a toad"),
        RealPair("城", "город"),
    ]
    groups = real.group_pairs(pairs)
    assert groups[0] == groups[1] == groups[2] and groups[3] == groups[4]
    assert len({int(group) for group in groups}) == 3
    assert sorted(number for numbers in real.split_pairs(pairs).values() for number in numbers) == [0, 3, 5]


def test_a_corpus_is_written_in_the_form_that_training_reads(cache, tmp_path):
    counts = real.write_corpus("stamps", tmp_path / "out", cache)
    assert counts["dropped"] == 0 and sum(counts.values()) == 30 and counts["train"] > counts["test"] > 0
    again = real.write_corpus("stamps", tmp_path / "again", cache)
    assert again == counts  # the split follows from the content
    rows = [
        json.loads(line)
        for name in real.SPLITS
        for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len({row["positive_text"] for row in rows}) == 30
    (source,) = load_user_data([str(tmp_path / "out" / "train.jsonl")])
    assert len(source.pairs) == counts["train"]
    assert Image.open(tmp_path / "out" / "samples.png").size[0] > 500
