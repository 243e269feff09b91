"""Pages of a PDF as images, one at a time, through PDFium (`pip install st_btok[pdf]`).

    for image in pdf_pages("report.pdf", dpi=144):
        ...

A page image is an ordinary input of every model that takes images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

_POINTS_PER_INCH = 72
# An A0 poster at 144 dots per inch has 32 million pixels. Drawing takes about 10 bytes for each, and a file of a few
# bytes can claim a page of any size.
LARGEST_PAGE = 50_000_000


def pdf_pages(
    path: str | Path, dpi: float = 144, pages: Sequence[int] | None = None, password: str | None = None
) -> Iterator[Image.Image]:
    """Render the pages of a PDF file, lazily: the file is checked at once, each page is drawn when it is asked for.

    Args:
        path: A PDF file.
        dpi: Pixels per inch, above 0. Default 144: a US letter page becomes 1,224 x 1,584 pixels.
        pages: Page numbers from 0, in the order wanted. Default: all of them.
        password: Password of an encrypted file.

    Returns:
        An iterator over RGB images, on white, as large as the page at `dpi`.

    Raises:
        ImportError: If pypdfium2 is missing.
        ValueError: If `dpi` is not above 0, the file is missing, damaged, encrypted or without pages, there is no such
            page, or a page (when it is drawn) is larger than `LARGEST_PAGE` pixels.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("PDF files are read by pypdfium2. Install it with `pip install st_btok[pdf]`") from error
    if not dpi > 0:
        raise ValueError(f"dpi must be above 0, got {dpi}. 144 suits ordinary print.")
    if not Path(path).is_file():
        raise ValueError(f"there is no PDF file {str(path)!r}. Check the path.")
    try:
        document = pypdfium2.PdfDocument(path, password=password)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            hint = "is encrypted; pass its password" if password is None else "has another password"
            raise ValueError(f"the PDF file {str(path)!r} {hint}.") from error
        raise ValueError(
            f"{str(path)!r} is no PDF file, damaged, or without pages: {error}. Make it again."
        ) from error
    numbers = range(len(document)) if pages is None else pages
    wrong = [number for number in numbers if not 0 <= number < len(document)]
    if wrong or not len(document):
        total = len(document)
        document.close()
        if not total:
            raise ValueError(f"the PDF file {str(path)!r} has no pages. Leave it out.")
        raise ValueError(f"the PDF file {str(path)!r} has the pages 0 to {total - 1}, asked for {wrong}.")
    return _render(document, str(path), numbers, dpi / _POINTS_PER_INCH, pypdfium2.PdfiumError)


def _render(
    document: Any, path: str, numbers: Sequence[int], scale: float, document_error: type[Exception]
) -> Iterator[Image.Image]:
    with document:
        for number in numbers:
            try:
                page = document[number]
            except document_error as error:
                raise ValueError(
                    f"page {number} of {path!r} can't be read: {str(error).rstrip('.')}. Leave it out, or repair it."
                ) from error
            width, height = (side * scale for side in page.get_size())
            if not 1 <= width * height <= LARGEST_PAGE:
                raise ValueError(
                    f"page {number} of {path!r} would have {width:.0f} x {height:.0f} pixels, at least 1 and at most "
                    f"{LARGEST_PAGE} can be drawn. Change dpi."
                )
            bitmap = page.render(scale=scale)
            image = bitmap.to_pil().convert("RGB")
            bitmap.close()
            page.close()
            yield image
