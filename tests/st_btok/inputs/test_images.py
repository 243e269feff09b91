"""Image rules against pixels that are known beforehand."""

from __future__ import annotations

import base64
import io
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import registered_extensions

from st_btok.inputs.fetch import MediaOptions, open_source
from st_btok.inputs.images import LARGEST_IMAGE, open_image, rgb_image, shrink
from st_btok.inputs.videos import check_video, read_video
from tests.backbones import picture


def png_header(width: int, height: int) -> bytes:
    """A PNG file that announces a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.mode == right.mode == "RGB" and np.array_equal(np.asarray(left), np.asarray(right))


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "picture.png"
    picture(56, 28, 1).save(path)
    return path


def test_every_source_of_one_picture_gives_the_same_pixels(png):
    data = png.read_bytes()
    array = np.asarray(picture(56, 28, 1))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    planes = np.moveaxis(array, -1, 0)
    for source in (
        png,
        str(png),
        data,
        uri,
        base64.b64encode(data).decode(),
        array,
        planes,
        torch.tensor(planes),
        torch.tensor(array),
        array / 255,
    ):
        assert same(rgb_image(source), picture(56, 28, 1))


@pytest.mark.parametrize("mode", ["RGBA", "RGBX", "CMYK", "L", "1", "LA", "HSV", "P", "PA"])
def test_modes_keep_their_colours(mode):
    converted = picture(56, 28, 1).convert(mode)
    assert same(rgb_image(converted), converted.convert("RGB"))


def test_transparency_is_dropped_unless_a_background_is_asked_for(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 300), (0, 0, 0, 128))
    assert rgb_image(clear).getpixel((0, 0)) == (255, 0, 0), "as plain encode: the hidden red shows"
    assert rgb_image(clear, background="white").getpixel((0, 0)) == (255, 255, 255)
    over_green = np.asarray(rgb_image(half, background="#00ff00"))
    assert (over_green == (0, 127, 0)).all(), "in every strip"
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png", transparency=0)
    assert rgb_image(tmp_path / "palette.png", background="white").getpixel((0, 0)) == (255, 255, 255)
    assert same(rgb_image(np.asarray(half), background="white"), rgb_image(half, background="white"))


def test_sixteen_bits_become_eight_and_not_white(tmp_path):
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    expected = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    for source in (tmp_path / "grey.png", values, Image.fromarray(values.astype(np.int32))):
        assert same(rgb_image(source), expected)
    assert same(rgb_image(Image.fromarray(np.float32(values >> 8))), expected)
    dark = np.arange(64, dtype=np.uint16).reshape(8, 8)  # 8-bit values in a 16-bit file: as they are, not black
    expected = Image.fromarray(dark.astype(np.uint8)).convert("RGB")
    for source in (dark, Image.fromarray(dark), torch.tensor(dark.astype(np.int32))):
        assert same(rgb_image(source), expected)


def test_exif_orientation_is_applied_to_files_and_to_opened_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    picture(56, 28, 1).save(tmp_path / "phone.png", exif=exif)
    expected = picture(56, 28, 1).rotate(-90, expand=True)
    assert same(rgb_image(tmp_path / "phone.png"), expected)
    assert same(rgb_image(Image.open(tmp_path / "phone.png")), expected)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [picture(28, 28, seed) for seed in range(3)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    moved = Image.open(path)
    moved.seek(2)
    alone = tmp_path / f"still.{suffix}"
    frames[0].save(alone, lossless=True)
    assert same(rgb_image(path), rgb_image(alone)) and same(rgb_image(moved), rgb_image(alone))
    assert moved.tell() == 2, "the given image is left where it was"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (1, 1)), ((1, 150), (1, 150)), ((500, 1), (500, 3)), ((4, 1000), (5, 1000)), ((1000, 5), (1000, 5))],
)
def test_too_thin_images_are_padded_with_white(size, expected):
    image = rgb_image(Image.new("RGB", size))
    assert image.size == expected
    black = (np.asarray(image) == 0).all(-1)
    assert black.sum() == size[0] * size[1], "every pixel of the image is kept"
    assert (np.asarray(image)[~black] == 255).all()


def test_a_line_is_shrunk_before_it_is_padded(tmp_path):
    Image.new("1", (1, 200_000)).save(tmp_path / "line.png")
    assert (tmp_path / "line.png").stat().st_size < 1000
    width, height = rgb_image(tmp_path / "line.png").size
    assert width * height <= 2**22 + height and height <= 200 * width, "not 1,000 x 200,000"


def stock_pixels(path) -> Image.Image:
    """What the processors' own loader makes of a file in plain `encode`."""
    from transformers.image_utils import load_image_as_tensor

    return Image.fromarray(load_image_as_tensor(str(path)).permute(1, 2, 0).numpy())


# Where plain `encode` is wrong: it forgets the orientation of WebP files, and behind transparent pixels of a GIF it
# shows another colour than the file's own. `test_files_that_plain_encode_misreads` has what is right.
MISREAD = {("webp", "exif"), ("gif", "trns")}
FORMS = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "trns", "exif"]


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [form for suffix in ("png", "jpg", "webp", "gif") for mode in FORMS if (form := (suffix, mode)) not in MISREAD],
)
def test_files_have_the_pixels_of_plain_encode(tmp_path, suffix, mode):
    path = tmp_path / f"picture.{suffix}"
    image = picture(56, 28, 1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((56, 28)))
    options = {"transparency": 3} if mode == "trns" else {}
    if mode == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    try:
        image.convert({"trns": "P", "exif": "RGB"}.get(mode, mode)).save(path, **options)
    except (OSError, ValueError) as error:
        pytest.skip(f"there is no such file: {error}")
    for source in (path, path.read_bytes(), Image.open(path)):
        assert same(rgb_image(source), stock_pixels(path))


def test_files_that_plain_encode_misreads(tmp_path):
    turned = tmp_path / "turned.webp"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(56, 28, 1).save(turned, exif=exif, lossless=True)
    upright = picture(56, 28, 1).transpose(Image.Transpose.ROTATE_270)
    assert same(rgb_image(turned), upright) and not same(stock_pixels(turned), upright)
    keyed = tmp_path / "keyed.gif"
    indexed = picture(56, 28, 1).convert("P")
    indexed.save(keyed, transparency=int(np.asarray(indexed)[0, 0]))
    with Image.open(keyed) as file:
        colours = np.array(file.getpalette()).reshape(-1, 3)[np.asarray(file)].astype(np.uint8)
    assert same(rgb_image(keyed), Image.fromarray(colours)) and not same(stock_pixels(keyed), Image.fromarray(colours))


def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # None: a program has lifted Pillow's own limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=r"bomb.png' (is too large|has 50000 x 50000 pixels).*Shrink it first"):
            rgb_image(path)
    assert 50_000**2 > LARGEST_IMAGE
    with pytest.raises(ValueError, match="more than 178956970 pixels"):
        rgb_image(np.broadcast_to(np.uint8(0), (50_000, 50_000)))


def test_broken_files(tmp_path, png):
    data = png.read_bytes()
    cases = {"cut.png": data[: len(data) // 2], "empty.png": b"", "text.png": b"not a picture"}
    jpeg = tmp_path / "full.jpg"
    picture(280, 280, 1).save(jpeg)
    cases["cut.jpg"] = jpeg.read_bytes()[: jpeg.stat().st_size // 2]
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}' (can't be decoded|is not an image).*(Make|Convert)"):
            rgb_image(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere.png' does not exist. Check the path"):
        rgb_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="is a folder"):
        rgb_image(tmp_path)
    with pytest.raises(ValueError, match="is not base64"):
        rgb_image("data:image/png;base64,%%%")
    for name in ("x" * 5000, "a\0b", "QUJD" * 100):
        with pytest.raises(ValueError, match="does not exist|is not an image"):
            rgb_image(name)
    with pytest.raises(ValueError, match="no pixels"):
        rgb_image(Image.new("RGB", (0, 5)))


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("Ghostscript"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for name in ("print.eps", "print.png", "print.gif"):
        (tmp_path / name).write_bytes(script)
        for source in (tmp_path / name, str(tmp_path / name), script, base64.b64encode(script * 3).decode()):
            for read in (
                rgb_image,
                open_image,
                read_video,
                lambda source: check_video(open_source(source), MediaOptions()),
            ):
                with pytest.raises(ValueError, match="PostScript"):
                    read(source)
    for read in (rgb_image, open_image):
        with pytest.raises(ValueError, match="PostScript"):
            read(Image.open(tmp_path / "print.eps"))


def test_an_opened_image_that_is_cut_is_found_too(tmp_path, png):
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[: png.stat().st_size // 2])
    with pytest.raises(ValueError, match="the PngImageFile can't be decoded: .*truncated"):
        rgb_image(Image.open(tmp_path / "cut.png"))


FORMATS = [
    name
    for name in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "DDS")
    if name in registered_extensions().values()
]


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_damage_is_a_picture_or_a_value_error(name, data):
    """Whatever a decoder raises for broken files, a long run sees one kind of error."""
    buffer = io.BytesIO()
    picture(56, 56, 1).save(buffer, name)
    damaged = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    source = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        assert rgb_image(source).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith("the bytes")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2, 3), np.nan, np.float32), r"12 NaN or infinite values, the first at \(0, 0, 0\)"),
        (np.full((2, 2, 3), np.inf), "12 NaN or infinite"),
        (np.full((2, 2, 3), -1.0), r"within 0..255 .*got -1..-1. It may be normalised"),
        (np.full((2, 2, 3), 300), "got 300..300"),
        (torch.full((3, 2, 2), float("nan")), "12 NaN"),
        (np.zeros((2, 2, 5)), "must have 1, 3 or 4 channels"),
        (np.zeros((0, 2, 3)), "is no image"),
        (np.zeros(3), "is no image"),
        (np.full((2, 2), "a"), "must hold numbers"),
        (torch.zeros(3, 2, 2, device="meta"), "one by one, got a tensor that is meta"),
        (torch.zeros(3, 2, 2).to_sparse(), "a tensor that is torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.zeros(3, 2, 2), 0.1, 0, torch.quint8), "a tensor that is quantised"),
    ],
)
def test_arrays_that_are_no_pictures(values, message):
    with pytest.raises(ValueError, match=message):
        rgb_image(values)


def test_where_both_ends_could_be_channels_arrays_have_them_last_and_tensors_first():
    values = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert rgb_image(values).size == (5, 3)
    assert rgb_image(torch.tensor(values)).size == (3, 5)


def test_shrinking_keeps_the_shape():
    assert shrink(picture(280, 140), None).size == (280, 140)
    assert rgb_image(picture(280, 140), max_pixels=200).size == (20, 10)
    assert rgb_image(Image.new("RGB", (1000, 20)), max_pixels=10).size == (22, 1)
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        shrink(picture(), 0)


def drawn_text() -> Image.Image:
    """Black strokes on white in a palette, with corners of a third colour."""
    image = Image.new("P", (56, 56), 0)
    image.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9])
    for row in range(8, 48, 8):
        image.paste(1, (8, row, 48, row + 4))
    image.paste(2, (0, 0, 4, 4))
    return image


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparency_key_takes_no_ink(tmp_path, mode):
    """Left in `info`, processors paint every pixel of that colour white."""
    plain = drawn_text().convert(mode)
    key = {"P": 1, "RGB": (0, 0, 0), "L": 0}[mode]
    plain.save(tmp_path / "plain.png")
    plain.save(tmp_path / "keyed.png", transparency=key)
    for source in (tmp_path / "keyed.png", Image.open(tmp_path / "keyed.png")):
        found = rgb_image(source)
        assert same(found, rgb_image(tmp_path / "plain.png")) and not found.has_transparency_data
    assert "transparency" in Image.open(tmp_path / "keyed.png").info
    over = np.asarray(rgb_image(tmp_path / "keyed.png", background="red"))
    assert (over[10, 10] == (255, 0, 0)).all(), "where a background is asked for, the key counts"


def psd(image: Image.Image) -> bytes:
    """A flat Photoshop file."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, image.height, image.width, 8, 3)
    planes = b"".join(band.tobytes() for band in image.split())
    return header + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + planes


def test_photoshop_files(tmp_path):
    (tmp_path / "layers.psd").write_bytes(psd(picture(56, 28, 1)))
    for source in (tmp_path / "layers.psd", Image.open(tmp_path / "layers.psd")):
        assert same(rgb_image(source), picture(56, 28, 1))
    assert np.array_equal(read_video(tmp_path / "layers.psd").frames[0], np.asarray(picture(56, 28, 1)))


def with_chunk(png: bytes, kind: bytes, data: bytes, broken: bool, before: bytes) -> bytes:
    """A PNG with one more chunk, its check sum right or wrong."""
    check = zlib.crc32(kind + data) ^ broken
    place = png.index(before) - 4
    return png[:place] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check) + png[place:]


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_broken_metadata_of_a_png_are_no_reason(tmp_path, png, before):
    data = png.read_bytes()
    exif = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    for kind, content, broken in (
        (b"tEXt", b"Comment\0hello", True),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27), 9), False),
        (b"eXIf", b"no exif", False),
        *([(b"eXIf", exif, True)] if before == b"IDAT" else []),
    ):
        path = tmp_path / "broken.png"
        path.write_bytes(with_chunk(data, kind, content, broken, before))
        assert same(rgb_image(path), picture(56, 28, 1)) and same(rgb_image(path), stock_pixels(path))
        assert open_image(path).size == (56, 28)
    path.write_bytes(with_chunk(with_chunk(data, b"tEXt", b"a\0b", True, before), b"eXIf", exif, False, b"IDAT"))
    assert same(rgb_image(path), picture(56, 28, 1).rotate(-90, expand=True)), "whole metadata count"
    path.write_bytes(with_chunk(data, b"tEXt", b"a\0b", True, before)[:-40])
    with pytest.raises(ValueError, match="broken.png' can't be decoded"):
        rgb_image(path)


def test_broken_exif_of_a_jpeg_is_no_reason(tmp_path):
    picture(56, 28, 1).save(tmp_path / "a.jpg", exif=b"Exif\0\0no exif at all")
    assert same(rgb_image(tmp_path / "a.jpg"), stock_pixels(tmp_path / "a.jpg"))


def test_heic_is_read_or_names_what_reads_it(tmp_path, monkeypatch):
    start = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64)
    (tmp_path / "phone.heic").write_bytes(start)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(
            ValueError, match="phone.heic' is HEIC, which pillow-heif reads: `pip install pillow-heif`"
        ):
            rgb_image(tmp_path / "phone.heic")
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif reads HEIC files")
    with pytest.raises(ValueError, match="phone.heic' is HEIC that can't be opened"):
        rgb_image(tmp_path / "phone.heic")
    heif.from_pillow(Image.new("RGB", (64, 32), "red")).save(tmp_path / "phone.heic")
    found = np.asarray(rgb_image(tmp_path / "phone.heic"))
    assert found.shape == (32, 64, 3) and np.abs(found.astype(int) - (255, 0, 0)).max() < 12


def test_an_image_object_that_many_threads_read(tmp_path):
    """One lazily opened object in many rows: each gets its pixels, and the object stays where it was."""
    frames = [picture(280, 280, seed) for seed in range(3)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    for _ in range(5):
        shared = Image.open(tmp_path / "moving.png")
        shared.seek(2)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(rgb_image, [shared] * 8))
        assert all(same(image, frames[0]) for image in found) and shared.tell() == 2
