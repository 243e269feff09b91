"""Pages of a PDF as images, one at a time, through PDFium (`pip install pypdfium2`, the extra `pdf`).

    for image in pdf_pages("report.pdf", dpi=144):
        ...

A page image is an ordinary input of every model that takes images.
"""

from __future__ import annotations

import io
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

_POINTS_PER_INCH = 72
# An A0 poster at 144 dots per inch has 32 million pixels. Drawing takes about 10 bytes for each, and a file of a few
# bytes can claim a page of any size.
LARGEST_PAGE = 50_000_000
_OBJECTS_BYTES = 2**24  # of one packed group of objects that are looked through
# PDFium is not thread-safe, not even for different documents. Re-entrant, as the collector may close a document in the
# thread that draws another one.
_PDFIUM = threading.RLock()


def pdf_pages(
    path: str | Path, dpi: float = 144, pages: Sequence[int] | None = None, password: str | None = None
) -> Iterator[Image.Image]:
    """Render the pages of a PDF file, lazily: the file is checked at once, each page is drawn when it is asked for.

    Form fields are drawn with their values. Threads take turns.

    Args:
        path: A PDF file.
        dpi: Pixels per inch, above 0. Default 144: a US letter page becomes 1,224 x 1,584 pixels.
        pages: Page numbers from 0, in the order wanted. Default: all of them.
        password: Password of an encrypted file.

    Returns:
        An iterator over RGB images, on white, as large as the page at `dpi`. It goes on after a page that raised.

    Raises:
        ImportError: If pypdfium2 is missing.
        ValueError: If `dpi` is not above 0, the file is missing, damaged, encrypted or without pages, there is no such
            page, or a page (when it is drawn) is larger than `LARGEST_PAGE` pixels.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("PDF files are read by pypdfium2. Install it with `pip install pypdfium2`") from error
    if not dpi > 0:
        raise ValueError(f"dpi must be above 0, got {dpi}. 144 suits ordinary print.")
    if not Path(path).is_file():
        raise ValueError(f"there is no PDF file {str(path)!r}. Check the path.")
    return PdfPages(pypdfium2, str(path), dpi / _POINTS_PER_INCH, pages, password)


class PdfPages(Iterator[Image.Image]):
    """The pages of one open document; a page that can't be drawn raises, and the next call draws the one after it."""

    def __init__(
        self, pypdfium2: ModuleType, path: str, scale: float, pages: Iterable[int] | None, password: str | None
    ) -> None:
        self._error, self._raw = pypdfium2.PdfiumError, pypdfium2.raw
        self._path, self._scale = path, scale
        self._document: Any = None
        self._new_document: Any = None
        with _PDFIUM:
            try:
                self._document = pypdfium2.PdfDocument(path, password=password)
                self._document.init_forms()  # before any page is opened; makes the appearances that fields lack
            except self._error as error:
                if "password" in str(error).lower():
                    hint = "is encrypted; pass its password" if password is None else "has another password"
                    raise ValueError(f"the PDF file {path!r} {hint}.") from error
                raise ValueError(
                    f"{path!r} is no PDF file, damaged, or without pages: {str(error).rstrip('.')}. Make it again."
                ) from error
            total = len(self._document)
            if self._document.formenv:  # without the blue in which a viewer shows what can be filled in
                self._raw.FPDF_SetFormFieldHighlightAlpha(self._document.formenv, 0)
            if _mentions_user_unit(path):
                self._new_document = pypdfium2.PdfDocument.new
        numbers = list(range(total) if pages is None else pages)
        wrong = [number for number in numbers if not 0 <= number < total]
        if not total:
            raise ValueError(f"the PDF file {path!r} has no pages. Leave it out.")
        if wrong:
            raise ValueError(f"the PDF file {path!r} has the pages 0 to {total - 1}, asked for {wrong}.")
        self._numbers = iter(numbers)

    def __next__(self) -> Image.Image:
        try:
            number = next(self._numbers)
        except StopIteration:
            self.close()
            raise
        with _PDFIUM:
            try:
                page = self._open_page(number)
            except self._error as error:
                raise ValueError(
                    f"{self._name(number)} can't be read: {str(error).rstrip('.')}. Leave it out, or repair it."
                ) from error
            try:
                return self._draw(page, number)
            finally:
                page.close()

    def close(self) -> None:
        """Close the file; done by itself after the last page."""
        with _PDFIUM:
            if self._document is not None:
                self._document.close()
                self._document = None
        self._numbers = iter(())

    def __del__(self) -> None:
        self.close()

    def _name(self, number: int) -> str:
        return f"page {number + 1} of {self._path!r}"

    def _open_page(self, number: int) -> Any:
        """A page whose form fields are part of what it shows.

        PDFium draws fields by itself only where they belong to a form, and those without an appearance of their own in
        the colours of a screen's sub-pixels.
        """
        page = self._document[number]
        if any(self._is_field(page, index) for index in range(self._raw.FPDFPage_GetAnnotCount(page))):
            self._raw.FPDFPage_Flatten(page, self._raw.FLAT_NORMALDISPLAY)
            page.close()
            page = self._document[number]
        return page

    def _is_field(self, page: Any, index: int) -> bool:
        annotation = self._raw.FPDFPage_GetAnnot(page, index)
        kind = self._raw.FPDFAnnot_GetSubtype(annotation)
        self._raw.FPDFPage_CloseAnnot(annotation)
        return kind == self._raw.FPDF_ANNOT_WIDGET

    def _draw(self, page: Any, number: int) -> Image.Image:
        scale = self._scale * self._user_unit(number)
        width, height = (side * scale for side in page.get_size())
        if not 1 <= width * height <= LARGEST_PAGE:
            raise ValueError(
                f"{self._name(number)} would have {width:.0f} x {height:.0f} pixels, at least 1 and at most "
                f"{LARGEST_PAGE} can be drawn. Change dpi."
            )
        bitmap = page.render(scale=scale)
        image = bitmap.to_pil().convert("RGB")
        bitmap.close()
        return image

    def _user_unit(self, number: int) -> float:
        """The points in one unit of the page (`UserUnit`), read from a copy of it, as PDFium does not tell them."""
        if self._new_document is None:
            return 1.0
        copy, written = self._new_document(), io.BytesIO()
        try:
            copy.import_pages(self._document, [number])
            copy.save(written)
        finally:
            copy.close()
        found = re.search(rb"/UserUnit ?(\d*\.?\d+)", written.getvalue())
        return float(found[1]) or 1.0 if found else 1.0


def _mentions_user_unit(path: str) -> bool:
    """Whether any page of a file may have a unit of its own; hardly any file does."""
    data = Path(path).read_bytes()
    if b"/UserUnit" in data or b"/Encrypt" in data:
        return True
    for start in re.finditer(rb"/ObjStm\b[^>]*>>\s*stream\r?\n", data):
        packed = data[start.end() : data.find(b"endstream", start.end())]
        try:
            if b"/UserUnit" in zlib.decompressobj().decompress(packed, _OBJECTS_BYTES):
                return True
        except zlib.error:  # packed in another way, or damaged
            return True
    return False
