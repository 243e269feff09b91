"""What happens to every kind of input, by running it: plain `encode` beside the checked path.

python -m tests.inputs_table --write docs/inputs.md
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from st_btok import build_model, encode_checked, pdf_pages
from tests.backbones import build, clip, picture
from tests.st_btok.inputs.test_images import drawn_text, psd, with_chunk
from tests.st_btok.inputs.test_pdf import form
from tests.st_btok.inputs.test_videos import RISING, copy_movie, write_movie

HEAD = """# Inputs

What `encode_checked`, `recipes.encode_corpus` and the training recipe make of every kind of input, and plain `encode`
of the same; the training recipe and the corpus job read through the same functions. Written by
`python -m tests.inputs_table --write docs/inputs.md` on a tiny Qwen2-VL: *equal* means vectors within 1e-5 of each
other, *reason* a bad row under `on_error="skip"`.

| input | plain `encode` | checked path |
|---|---|---|
"""
TAIL = """
Transparency: a file loses it in plain `encode`, a PIL image with an alpha channel is laid over white by some
processors; the checked path treats both as plain `encode` treats the file. `background="white"` lays both over white.

Not run here, because it would end the process: plain `encode([{"image": path}])` crashes (segmentation fault in the
decoder that sentence-transformers takes from torchvision) on some corrupt PNGs. The checked path never uses it.
"""


def kinds(folder: Path) -> dict[str, Any]:
    """Inputs by description."""
    rgb = picture(56, 28, 1)
    clear = rgb.convert("RGBA")
    clear.putalpha(100)
    grey = Image.fromarray(np.arange(28 * 56, dtype=np.uint16).reshape(28, 56) * 40)
    dark = Image.fromarray((np.arange(28 * 56) % 256).astype(np.uint16).reshape(28, 56))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"rgb.png": rgb, "rgb.jpg": rgb, "rgb.bmp": rgb, "rgb.tiff": rgb, "clear.png": clear, "grey16.png": grey}
    for name, image in {**files, "dark16.png": dark}.items():
        image.save(folder / name)
    rgb.save(folder / "turned.webp", exif=exif, lossless=True)
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[picture(56, 28, 2)])
    data = (folder / "rgb.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "words.png").write_bytes(b"no picture")
    keyed = drawn_text()
    keyed.save(folder / "keyed.png", transparency=1)
    keyed.save(folder / "keyed.gif", transparency=1)
    (folder / "layers.psd").write_bytes(psd(rgb))
    (folder / "broken_metadata.png").write_bytes(with_chunk(data, b"tEXt", b"a\0b", True, b"IDAT"))
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64))
    (folder / "print.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nother.ts\n")
    named = {f"image file {name}": {"image": str(folder / name)} for name in sorted(p.name for p in folder.iterdir())}
    del named["image file list.m3u8"]
    options = {"g": "20", "bf": "3"}
    whole = write_movie(folder / "whole.mp4", RISING, codec="libx264", rate=30, options=options)
    copy_movie(whole, folder / "cut_without_encoding.mp4", shift=0.5)
    write_movie(folder / "mirrored.mp4", prepare=lambda stream: stream.set_display_rotation(0, hflip=True))
    uneven = [33 * number for number in range(30)] + [1000 * number for number in range(1, 31)]
    write_movie(folder / "uneven_times.mp4", RISING, rate=30, times=uneven)
    (folder / "torn.mp4").write_bytes(whole.read_bytes()[:2000])
    (folder / "form.pdf").write_bytes(form(b"/FT/Tx/V(4711 EUR)"))
    films = ("whole.mp4", "cut_without_encoding.mp4", "mirrored.mp4", "uneven_times.mp4", "torn.mp4")
    named |= {f"video file {name}": {"video": str(folder / name)} for name in films}
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG")
    return {
        "text": "words",
        "empty text": "",
        "half a character (lone surrogate)": "half \ud800",
        "a number": 3,
        "None": None,
        "path of a missing image": "gone.png",
        **named,
        "image as bytes": {"image": buffer.getvalue()},
        "PIL image": rgb,
        "PIL image with transparency": clear,
        "PIL image, 16-bit grey": grey,
        "array of uint8": np.asarray(rgb),
        "array of uint16, all within 255": np.asarray(rgb).astype(np.uint16),
        "array of floats within 0..1": np.asarray(rgb) / 255,
        "array with NaN": np.full((28, 28, 3), np.nan, np.float32),
        "sparse tensor": torch.zeros(3, 28, 28).to_sparse(),
        "image of 1 x 1": Image.new("RGB", (1, 1)),
        "image of 1 x 2,000": Image.new("RGB", (1, 2000)),
        "two images and a text": {"image": [rgb, picture(28, 28, 2)], "text": "words"},
        "empty list of images": {"image": [], "text": "words"},
        "video as an array": clip(4),
        "video without frames": {"video": []},
        "path of a PDF": str(folder / "form.pdf"),
        "page of a PDF, a filled form": next(pdf_pages(folder / "form.pdf")),
        "playlist as a video": {"video": str(folder / "list.m3u8")},
        "URL of an image": {"image": "http://127.0.0.1:9/a.png"},
        "unknown key": {"img": rgb},
    }


def outcome(model: SentenceTransformer, value: Any) -> tuple[str, str]:
    """What plain `encode` and the checked path do."""
    stock = None
    try:
        stock = model.encode([value])[0]
        plain = "a vector" if np.isfinite(stock).all() else "**NaN**"
    except Exception as error:
        plain = f"{type(error).__name__}"
    found = encode_checked(model, [value], on_error="skip")
    if found.skipped:
        reason = found.skipped[0].reason.split(". ")[0]
        return plain, f"reason: {shortened(reason)}"
    if stock is None:
        return plain, "a vector"
    difference = float(np.abs(stock - found.embeddings[0]).max())
    return plain, "equal" if difference < 1e-5 else f"a vector, {difference:.2f} away"


def shortened(text: str) -> str:
    """A reason without machine paths, on one line."""
    words = [Path(word.strip("'")).name if word.startswith("'/") else word for word in text.split()]
    return " ".join(words).replace("|", "\\|")[:110]


def table() -> str:
    """The page."""
    backbone, processor = build("qwen2_vl")
    model = build_model(backbone, processor=processor, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = [f"| {name} | {' | '.join(outcome(model, value))} |" for name, value in kinds(Path(folder)).items()]
    return HEAD + "\n".join(rows) + "\n" + TAIL


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", default="", help="file to write; default: print")
    place = parser.parse_args().write
    Path(place).write_text(table()) if place else print(table())
