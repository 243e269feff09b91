"""PDF pages; needs pypdfium2 (extra `pdf`)."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from st_btok.inputs.pdf import pdf_pages
from tests.backbones import picture

pytest.importorskip("pypdfium2", reason="pypdfium2 (extra `pdf`) reads PDF files")
# One blank page of 72 x 72 points under the password "secret" (RC4, 40 bits), written with pypdf.
ENCRYPTED = (
    "c-oCp%Wl*_5WLS<^kt7^9`1Qb)*eW*5(1Rf2DqRc#xp&O(aMgzUMb-xIq(PYBa96M!*akHOQY(l>UOnP+pEnpc~P;|*KeP{FbM+s"
    "<|C_X#<xSCPLT$v8z+<U+S;&Y>oub;O&qo0zInVS;M=gLBjcC-sT)Bu{<2L+cn?^JJGfg&t260k7{j68vmYKXdG8hi{AVx5cXaGe"
    "LoA9?DRlmtQX8K452dZR5c6x*bnYhWfy!Wid+UYwyJ_qlD8^q=w;w+MilPHl9=);3m%^q!j3pF)JBBWWAu)afHR<4zGR`*1ClPb@"
    "Xc`-$)>%tY;)_`%DUH?`vB|L!K@+0M##2C7a^-KK_D)mID*BXB2&#gPF*lZc(*%RTG#aHNR90(OETq#`k;GVTvBLbvb{+=GOn_nH"
    ">4DO|(vaZ^ljYmzO7|Pn{tT1SonywHVQQ%zhtM8qm}9+dKT#Ql@A`g(YR;d(=yDJ8=l!betIky<8KX1NCX3Gdgp?~+S&e~mbnE}2"
    "ls#W}ad^BRLH}CxaSX#a2ZFZz>8tCT4f_rhsl^Q"
)


@pytest.fixture
def document(tmp_path):
    """Three pages of 112 x 56 points, each a picture of its own."""
    pages = [picture(112, 56, seed) for seed in range(3)]
    pages[0].save(tmp_path / "pages.pdf", save_all=True, append_images=pages[1:], resolution=72, quality=100)
    return tmp_path / "pages.pdf"


def close(left: Image.Image, right: Image.Image) -> bool:
    """Equal but for JPEG's rounding, which the file holds its pictures with."""
    return float(np.abs(np.asarray(left, float) - np.asarray(right, float)).mean()) < 8


def test_pages_in_order_and_at_the_asked_size(document):
    pages = list(pdf_pages(document, dpi=72))
    assert [page.size for page in pages] == [(112, 56)] * 3 and {page.mode for page in pages} == {"RGB"}
    for seed, page in enumerate(pages):
        assert close(page, picture(112, 56, seed)) and not close(page, picture(112, 56, seed + 1))
    assert [page.size for page in pdf_pages(str(document))] == [(224, 112)] * 3
    chosen = list(pdf_pages(document, dpi=72, pages=[2, 0]))
    assert close(chosen[0], pages[2]) and close(chosen[1], pages[0])


def test_pages_are_drawn_when_they_are_asked_for(document, monkeypatch):
    pypdfium2 = pytest.importorskip("pypdfium2")
    drawn = []
    render = pypdfium2.PdfPage.render
    monkeypatch.setattr(pypdfium2.PdfPage, "render", lambda page, **kw: drawn.append(page) or render(page, **kw))
    pages = pdf_pages(document)
    assert not drawn
    next(pages)
    assert len(drawn) == 1


def test_errors_come_before_the_first_page(document, tmp_path):
    data = document.read_bytes()
    for name, content in {"cut.pdf": data[: len(data) // 3], "empty.pdf": b"", "text.pdf": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is no PDF file, damaged, or without pages: .*Make it again"):
            pdf_pages(tmp_path / name)
    with pytest.raises(ValueError, match="no PDF file .*nowhere.pdf'. Check the path"):
        pdf_pages(tmp_path / "nowhere.pdf")
    with pytest.raises(ValueError, match=r"has the pages 0 to 2, asked for \[3, -1\]"):
        pdf_pages(document, pages=[0, 3, -1])
    with pytest.raises(ValueError, match="dpi must be above 0, got 0"):
        pdf_pages(document, dpi=0)


def test_a_document_without_pages(tmp_path):
    pypdfium2 = pytest.importorskip("pypdfium2")
    pypdfium2.PdfDocument.new().save(str(tmp_path / "none.pdf"))
    with pytest.raises(ValueError, match="none.pdf'.* without pages|has no pages"):
        pdf_pages(tmp_path / "none.pdf")


def test_encrypted_files_need_their_password(tmp_path):
    path = tmp_path / "locked.pdf"
    path.write_bytes(zlib.decompress(base64.b85decode(ENCRYPTED)))
    with pytest.raises(ValueError, match="locked.pdf' is encrypted; pass its password"):
        pdf_pages(path)
    with pytest.raises(ValueError, match="locked.pdf' has another password"):
        pdf_pages(path, password="guess")
    assert next(pdf_pages(path, dpi=72, password="secret")).size == (72, 72)


def test_pages_that_would_be_too_large_are_not_drawn(document):
    pages = pdf_pages(document, dpi=1_000_000)
    with pytest.raises(ValueError, match=r"page 1 of .* would have \d+ x \d+ pixels.*Change dpi"):
        next(pages)


def test_pages_are_inputs(document, qwen):
    embeddings = qwen.encode(list(pdf_pages(document, dpi=72)))
    single = np.stack([qwen.encode([page])[0] for page in pdf_pages(document, dpi=72)])
    assert np.abs(embeddings - single).max() < 1e-5
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3


@pytest.mark.parametrize("broken", [(rb"/Kids ?\[ ?\d+", b"/Kids [ 99"), (rb"/Type /Page\b", b"/Type /Nope")])
def test_a_broken_page_tree_is_a_reason_and_no_traceback(tmp_path, broken):
    file = io.BytesIO()
    picture(56, 84).save(file, "PDF", save_all=True, append_images=[picture(56, 84, 1)])
    damaged = re.sub(*broken, file.getvalue(), count=1)
    assert damaged != file.getvalue()
    (tmp_path / "broken.pdf").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"page 1 of .*broken.pdf' can't be read: .*or repair it"):
        list(pdf_pages(tmp_path / "broken.pdf"))


def form(field: bytes, page: bytes = b"", in_form: bool = True) -> bytes:
    """A page of 200 x 100 points with one form field at (20, 30), which is part of the document's form or not."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R%s>>"
        % (b"/AcroForm<</Fields[4 0 R]/DR<</Font<</Helv 6 0 R>>>>/DA(/Helv 18 Tf 0 g)>>" if in_form else b""),
        b"<</Type/Pages/Count 1/Kids[3 0 R]>>",
        b"<</Type/Page/MediaBox[0 0 200 100]/Parent 2 0 R/Annots[4 0 R]%s>>" % page,
        b"<</Type/Annot/Subtype/Widget/T(a)/Rect[20 30 180 70]/F 4/DA(/Helv 18 Tf 0 g)%s>>" % field,
        b"<</Type/XObject/Subtype/Form/BBox[0 0 160 40]/Length 27>>\nstream\n0 0 0 rg 10 10 60 20 re f \n\nendstream",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    return (
        b"%PDF-1.7\n"
        + b"".join(b"%d 0 obj\n%s\nendobj\n" % numbered for numbered in enumerate(objects, 1))
        + b"trailer<</Root 1 0 R>>\n%%EOF"
    )


@pytest.mark.parametrize(
    ("field", "in_form"),
    [
        (b"/FT/Tx/V(4711 EUR)/AP<</N 5 0 R>>", True),
        (b"/FT/Tx/V(4711 EUR)", True),
        (b"/FT/Ch/Ff 131072/Opt[(one)(two)]/V(two)", True),
        (b"/FT/Sig/AP<</N 5 0 R>>", True),
        (b"/FT/Tx/AP<</N 5 0 R>>", False),
    ],
    ids=["appearance", "text without appearance", "choice without appearance", "signature", "outside any form"],
)
def test_form_fields_show_their_values(tmp_path, field, in_form):
    (tmp_path / "filled.pdf").write_bytes(form(field, in_form=in_form))
    page = np.asarray(next(pdf_pages(tmp_path / "filled.pdf", dpi=72)))
    assert (page[30:70, 20:180] < 128).any(), "ink"
    outside = page.copy()
    outside[30:70, 20:180] = 255
    assert (outside == 255).all()
    assert (page.max(-1) - page.min(-1)).max() == 0, "without a viewer's blue"


def test_an_empty_field_is_white(tmp_path):
    (tmp_path / "empty.pdf").write_bytes(form(b"/FT/Tx"))
    assert (np.asarray(next(pdf_pages(tmp_path / "empty.pdf"))) == 255).all()


@pytest.mark.parametrize("packed", [False, True])
def test_pages_with_a_unit_of_their_own(tmp_path, packed):
    data = form(b"/FT/Tx", b"/UserUnit 2.5")
    if packed:  # as writers of today pack objects: nothing of the page can be read in the file's bytes
        page = b"<</Type/Page/MediaBox[0 0 200 100]/Parent 2 0 R/UserUnit 2.5>>"
        stream = zlib.compress(b"3 0 " + page)
        objects = [
            b"1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n",
            b"2 0 obj\n<</Type/Pages/Count 1/Kids[3 0 R]>>\nendobj\n",
            b"5 0 obj\n<</Type/ObjStm/N 1/First 4/Filter/FlateDecode/Length %d>>\nstream\n%s\nendstream\nendobj\n"
            % (len(stream), stream),
        ]
        data, places = b"%PDF-1.7\n", []
        for one in objects:
            places.append(len(data))
            data += one
        rows = [(0, 0, 65535), (1, places[0], 0), (1, places[1], 0), (2, 5, 0), (0, 0, 65535), (1, places[2], 0)]
        rows.append((1, len(data), 0))
        table = b"".join(struct.pack(">BHH", *row) for row in rows)
        data += b"6 0 obj\n<</Type/XRef/Size 7/W[1 2 2]/Root 1 0 R/Length %d>>\nstream\n%s\nendstream\nendobj\n" % (
            len(table),
            table,
        )
        data += b"startxref\n%d\n%%%%EOF" % rows[-1][1]
        assert b"UserUnit" not in data
    (tmp_path / "poster.pdf").write_bytes(data)
    assert next(pdf_pages(tmp_path / "poster.pdf", dpi=72)).size == (500, 250)


def test_a_page_that_raises_is_not_the_last(tmp_path, document):
    for pages, size in ((pdf_pages(document, pages=[0, 1, 2]), 3),):
        assert len(list(pages)) == size and next(pages, None) is None
    file = io.BytesIO()
    Image.new("RGB", (56, 28)).save(
        file, "PDF", save_all=True, append_images=[Image.new("RGB", (28, 56)), Image.new("RGB", (56, 56))]
    )
    (tmp_path / "three.pdf").write_bytes(
        re.sub(rb"/MediaBox \[ 0 0 28.0 56.0", b"/MediaBox [ 0 0 9999 9999", file.getvalue())
    )
    pages, found = pdf_pages(tmp_path / "three.pdf", dpi=72), []
    for _ in range(3):
        try:
            found.append(next(pages).size)
        except ValueError as error:
            found.append(str(error))
    assert found[0] == (56, 28) and found[2] == (56, 56) and found[1].startswith("page 2 of ")


def test_threads_take_turns(document):
    """PDFium is not thread-safe: two documents at once gave other pixels, refused good files or ended the process."""
    expected = [np.asarray(page) for page in pdf_pages(document)]
    with ThreadPoolExecutor(4) as pool:
        for pages in pool.map(lambda _: [np.asarray(page) for page in pdf_pages(document)], range(12)):
            assert all(map(np.array_equal, pages, expected))
