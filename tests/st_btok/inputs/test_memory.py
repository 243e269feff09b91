"""What hostile and large files may cost, measured in a process of its own; memory that can't be had is a bad row."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_btok.inputs import images, reader
from st_btok.inputs.encode import checked_inputs, encode_checked
from tests.backbones import picture

CHILD = """
import json, resource, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor
from st_btok.inputs.encode import check_rows
from st_btok.inputs.pdf import pdf_pages
from st_btok.inputs.reader import InputReader

torch.set_num_threads(1)
reader, process = InputReader(("text", "image", "video")), Qwen2VLImageProcessor()
process(reader.read(Image.new("RGB", (56, 56))), return_tensors="pt")

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

def made_of(path):
    try:
        if path.suffix == ".pdf":
            return next(pdf_pages(path)).size
        if path.suffix == ".gif":
            return reader.read({"video": path})["video"].shape
        image = reader.read(path)
        process(image, return_tensors="pt")
        return image.size
    except ValueError as error:
        return str(error)

folder = Path(sys.argv[1])
# First, as memory that was freed can be had again.
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (int((megabytes("VmSize") + 64) * 2**20), unlimited[1]))
rows = check_rows(enumerate(["good", folder / "large.png"]), reader, "skip")
resource.setrlimit(resource.RLIMIT_AS, unlimited)
found = {"limit": (rows.rows, [(bad.row, bad.reason) for bad in rows.skipped])}
for name in ("line.png", "absurd.pdf", "large.png", "large.gif"):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = megabytes("VmRSS")
    found[name] = made_of(folder / name), megabytes("VmHWM") - before
print(json.dumps(found))
"""
PAGE = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 14400 14400]>>endobj
trailer<</Root 1 0 R>>
%%EOF"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through Linux's /proc")
def test_what_large_files_cost(tmp_path):
    """Before: 1.5 GB for the line of 467 bytes, 4.1 GB for the page, 0.8 GB for the image, 3 GB for the animation."""
    pytest.importorskip("pypdfium2", reason="the extra `pdf` reads PDF files")
    Image.new("1", (1, 200_000)).save(tmp_path / "line.png")
    Image.new("RGBA", (6000, 6000), (1, 2, 3, 4)).save(tmp_path / "large.png")
    Image.new("P", (5000, 5000), 1).save(tmp_path / "one.gif")
    one = (tmp_path / "one.gif").read_bytes()
    frames = 13 + 3 * 2 ** ((one[10] & 7) + 1)  # behind the header and its palette
    (tmp_path / "large.gif").write_bytes(one[:frames] + 9 * one[frames:-1] + one[-1:])
    (tmp_path / "absurd.pdf").write_bytes(PAGE)
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "line.png").stat().st_size < 500 and found["line.png"][1] < 150
    reason, peak = found["absurd.pdf"]
    assert "can be drawn. Change dpi" in reason and peak < 50
    assert found["large.png"][0] == [3000, 3000] and found["large.png"][1] < 350, "it is 144 MB itself"
    assert found["large.gif"][0] == [8, 2048, 2048, 3] and found["large.gif"][1] < 700
    assert found["limit"] == [[0], [[1, "MemoryError"]]], "64 MiB more than the process has, for 144 MB"


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    """Small images meet at a barrier, so four are decoded at once; a second large one would find the first at work.

    They come as files: two image objects may share one of the locks that keep an object from being loaded twice.
    """
    together, alone = threading.Barrier(4, timeout=60), threading.Lock()

    def small(image, background):
        together.wait()
        return image

    def large(image, background):
        assert alone.acquire(blocking=False), "another large image is being decoded"
        time.sleep(0.02)
        alone.release()
        return image

    monkeypatch.setattr(images, "LARGE_IMAGE", 28 * 28)
    for size, decode in ((28, small), (56, large)):
        monkeypatch.setattr(images, "normalise", decode)
        with ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(images.rgb_image, [png(picture(size, size)) for _ in range(8)]))) == 8


def test_large_images_are_shrunk_as_the_whole_would_be(monkeypatch, tmp_path):
    """By strips, turned upright, over a background: as the whole image, reduced by the same factor."""
    monkeypatch.setattr(images, "LARGE_IMAGE", 100 * 100)
    monkeypatch.setattr(images, "_STRIP", 8)
    noise = np.random.default_rng(0).integers(0, 255, (210, 330, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "a.png", exif=exif)
    for background in (None, "white"):
        found = images.rgb_image(tmp_path / "a.png", background=background)
        whole = image.convert("RGB")
        if background:
            whole = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
        expected = whole.transpose(Image.Transpose.ROTATE_270).reduce(3)
        assert found.size == expected.size == (70, 110)
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_memory_that_runs_out_costs_the_row_alone(qwen, monkeypatch):
    def decode(opened, *options):
        if opened.value.size == (28, 28):
            raise MemoryError
        return opened.value

    monkeypatch.setattr(reader, "decode_image", decode)
    values = ["a", picture(28, 28), picture(56, 28), {"image": [picture(56, 28), picture(28, 28)]}]
    for found in (checked_inputs(values, qwen, "skip"), encode_checked(qwen, values, "skip")):
        assert found.rows == [0, 2]
        assert [(bad.row, bad.reason) for bad in found.skipped] == [(1, "MemoryError"), (3, "MemoryError")]
    with pytest.raises(ValueError, match="row 1: MemoryError"):
        encode_checked(qwen, values)
