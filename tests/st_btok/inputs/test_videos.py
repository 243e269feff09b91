"""Videos against frames that are known beforehand; file tests need PyAV."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st_btok.inputs.fetch import MediaOptions, open_source
from st_btok.inputs.videos import check_video, evenly, read_video
from tests.backbones import clip, picture


def checked(source) -> None:
    with open_source(source) as opened:
        check_video(opened, MediaOptions())


LEVELS = [20 * number for number in range(12)]


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """12 grey frames of rising brightness, 64 x 48, 5 frames a second."""
    return write_movie(tmp_path_factory.mktemp("video") / "movie.mp4")


def write_movie(path, levels=tuple(LEVELS), rotation=0, codec="mpeg4", rate=5, prepare=None, times=None, options=None):
    """Frames whose left half has the given brightness; `times` in milliseconds, where they are not even."""
    av = pytest.importorskip("av", reason="PyAV (extra `video`) decodes video files")
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this FFmpeg writes no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if prepare:
            prepare(stream)
        container.start_encoding()
        for number, level in enumerate(levels):
            values = np.full((48, 64, 3), level, np.uint8)
            values[:, 32:] = 255 - level
            frame = av.VideoFrame.from_ndarray(values, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy_movie(source, path, skip=0, shift=0.0):
    """The packets of a movie as they are: without the first ones, or so many seconds earlier."""
    av = pytest.importorskip("av")
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for packet in packets[skip:]:
            earlier = int(shift / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, stream
            new.mux(packet)
    return path


def brightness(frames: np.ndarray) -> list[float]:
    """Mean of each frame's left half."""
    return frames[:, :, :28].mean((1, 2, 3)).round().tolist()


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (10, 1, [5]),
        (10, 2, [0, 9]),
        (10, 4, [0, 3, 6, 9]),
        (11, 4, [0, 3, 6, 10]),
        (3, 8, [0, 1, 2]),
        (1, 1, [0]),
        (1, 8, [0]),
    ],
)
def test_frames_are_evenly_spaced(total, count, expected):
    assert evenly(total, count) == expected


def test_files_give_eight_frames_unless_asked_otherwise(movie):
    video = read_video(movie)
    assert video.frames.shape == (8, 48, 64, 3) and video.frames.dtype == np.uint8
    picks = evenly(12, 8)
    assert np.abs(np.array(brightness(video.frames)) - np.array(LEVELS)[picks]).max() <= 3
    assert video.metadata == {"fps": 5.0, "total_num_frames": 12, "duration": 2.4, "frames_indices": picks}
    assert len(read_video(str(movie), num_frames=100).frames) == 12
    assert np.array_equal(read_video(movie.read_bytes()).frames, video.frames)
    assert read_video(movie, num_frames=3, max_pixels=12 * 16).frames.shape == (3, 12, 16, 3)


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "cat.ffconcat", "cat.mp4", "terminal.ans"])
def test_playlists_open_no_other_file(tmp_path, movie, name):
    """FFmpeg itself opens the other file for some of these."""
    inner = str(write_movie(tmp_path / "inner.ts"))
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    text = head if name.startswith("list") else "ffconcat version 1.0\nfile {}\n" if name.startswith("cat") else "{}"
    (tmp_path / name).write_text(text.format("inner.ts" if name.startswith("cat") else inner))
    for read in (read_video, checked):
        for source in (tmp_path / name, (tmp_path / name).read_bytes()):
            with pytest.raises(ValueError, match="can't be decoded as a video"):
                read(source)


def test_one_frame_is_doubled(movie):
    video = read_video(movie, num_frames=1)
    assert len(video.frames) == 2 and np.array_equal(*video.frames) and video.metadata["frames_indices"] == [6, 6]
    assert np.array_equal(read_video(clip(1)).frames, np.repeat(clip(1), 2, 0))


def test_rotated_files_stand_upright(tmp_path, movie):
    turned = read_video(write_movie(tmp_path / "phone.mp4", rotation=90), num_frames=2).frames
    straight = read_video(movie, num_frames=2).frames
    assert turned.shape == (2, 64, 48, 3)
    assert np.abs(turned.astype(int) - np.rot90(straight, axes=(1, 2)).astype(int)).max() <= 3


RISING = tuple(range(0, 240, 4))


def numbers(video) -> list[int]:
    """Which of the 60 frames of `RISING` are shown."""
    return [round(level / 4) for level in brightness(video.frames)]


def test_a_clip_that_was_cut_without_encoding_again(tmp_path):
    """Its first packets are only there to be decoded from; an edit list hides them."""
    whole = write_movie(tmp_path / "whole.mp4", RISING, codec="libx264", rate=30, options={"g": "20", "bf": "3"})
    video = read_video(copy_movie(whole, tmp_path / "cut.mp4", shift=0.5))
    assert video.metadata == {"fps": 30.0, "total_num_frames": 45, "duration": 1.5, "frames_indices": evenly(45, 8)}
    assert np.abs(np.array(numbers(video)) - 15 - evenly(45, 8)).max() <= 1


def test_a_recording_that_begins_inside_a_group_of_pictures(tmp_path):
    options = {"g": "12", "bf": "2"}
    whole = write_movie(tmp_path / "whole.ts", RISING, codec="mpeg2video", rate=30, options=options)
    video = read_video(copy_movie(whole, tmp_path / "torn.ts", skip=17))
    total = video.metadata["total_num_frames"]
    assert total < 60 - 17, "what refers to the missing frames is not shown"
    first = 60 - total
    assert np.abs(np.array(numbers(video)) - first - evenly(total, 8)).max() <= 1


@pytest.mark.parametrize(("name", "codec"), [("raw.h264", "libx264"), ("raw.m4v", "mpeg4"), ("raw.m2v", "mpeg2video")])
def test_streams_without_times(tmp_path, name, codec):
    video = read_video(write_movie(tmp_path / name, RISING, codec=codec, rate=25))
    assert np.abs(np.array(numbers(video)) - evenly(60, 8)).max() <= 1
    assert video.metadata["total_num_frames"] == 60 and video.metadata["fps"] == 25


def test_frames_are_evenly_spaced_in_time(tmp_path):
    """30 frames in the first second, then one a second: the times are those of the file."""
    times = [33 * number for number in range(30)] + [1000 * number for number in range(1, 31)]
    path = write_movie(tmp_path / "phone.mp4", RISING, codec="mpeg4", rate=30, times=times)
    video = read_video(path)
    shown = np.array(video.metadata["frames_indices"]) / video.metadata["fps"]
    assert shown.tolist() == [0, 4, 8, 12, 17, 21, 25, 30], "the frames on screen at every 30/7 s"
    assert np.abs(np.array(numbers(video)) - [0, 33, 37, 41, 46, 50, 54, 59]).max() <= 1
    assert abs(video.metadata["total_num_frames"] / video.metadata["fps"] - 30) < 0.1
    assert len(read_video(path, num_frames=100).frames) == 60, "all of them, where there are no more"
    (middle, _) = read_video(path, num_frames=1).metadata["frames_indices"]
    assert middle == 15000


@pytest.mark.parametrize("name", ["movie.mp4", "movie.mkv", "movie.avi", "movie.ts"])
def test_rounded_times_are_even_times(tmp_path, name):
    """Matroska rounds to milliseconds: 30 frames a second are 0, 33, 67, ..."""
    video = read_video(write_movie(tmp_path / name, RISING, rate=30), num_frames=23)
    assert np.abs(np.array(numbers(video)) - evenly(60, 23)).max() <= 1
    assert video.metadata["frames_indices"] == evenly(60, 23) and abs(video.metadata["fps"] - 30) < 0.01


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("flipped", ["", "hflip", "vflip"])
def test_every_display_matrix(tmp_path, movie, turned, flipped):
    """A mirrored film is not one that is turned by 180 degrees."""

    def prepare(stream):
        stream.set_display_rotation(90 if turned else 0, **({flipped: True} if flipped else {}))

    found = read_video(write_movie(tmp_path / "turned.mp4", prepare=prepare), num_frames=2).frames.astype(int)
    expected = read_video(movie, num_frames=2).frames.astype(int)
    expected = np.rot90(expected, axes=(1, 2)) if turned else expected
    expected = {"": expected, "hflip": expected[:, :, ::-1], "vflip": expected[:, ::-1]}[flipped]
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 3


def test_pixels_that_are_not_square(tmp_path):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    video = read_video(write_movie(tmp_path / "wide.mp4", prepare=prepare))
    assert video.frames.shape == (8, 48, 85, 3)
    assert abs(brightness(video.frames)[0] - LEVELS[0]) <= 3


def test_a_long_film_is_not_decoded_whole(tmp_path, monkeypatch):
    """And what is jumped to is what decoding from the start shows."""
    av = pytest.importorskip("av")
    levels = [200 * number // 1200 for number in range(1200)]
    path = write_movie(tmp_path / "film.mp4", levels, rate=30, options={"g": "25"})
    decoded = 0

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def decode(self, *streams):
            nonlocal decoded
            for frame in self.container.decode(*streams):
                decoded += 1
                yield frame

    opened = av.open
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", lambda *args, **options: Counting(opened(*args, **options)))
        video = read_video(path)
    assert decoded <= 8 * 25, "a group of pictures for each frame"
    picks = set(evenly(1200, 8))
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for n, frame in enumerate(container.decode(video=0)) if n in picks]
    assert np.array_equal(video.frames, np.stack(plain))


def test_a_cover_is_no_film(tmp_path):
    """An album's picture is stored as a video stream of one frame."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "song.mp3"), "w") as container:
        sound = container.add_stream("mp3", rate=44100)
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 44100
        container.mux(sound.encode(tone))
        container.mux(sound.encode())
    with pytest.raises(ValueError, match="song.mp3' (has no video stream|can't be decoded)"):
        read_video(tmp_path / "song.mp3")


def test_animated_images_are_videos_too(tmp_path):
    frames = [picture(28, 28, seed) for seed in range(5)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_video(tmp_path / "moving.png").frames, np.stack(frames))
    assert np.array_equal(read_video(tmp_path / "moving.png", num_frames=2).frames, np.stack([frames[0], frames[4]]))
    checked(tmp_path / "moving.png")


def test_every_form_of_the_same_frames():
    frames = clip(4)
    forms = [
        frames,
        np.moveaxis(frames, -1, 1),
        torch.tensor(frames),
        torch.tensor(np.moveaxis(frames, -1, 1)),
        frames / 255,
        [Image.fromarray(frame) for frame in frames],
        tuple(frames),
        {"array": frames, "video_metadata": None},
        {"array": list(frames)},
    ]
    for form in forms:
        assert np.array_equal(read_video(form).frames, frames)
        assert np.array_equal(read_video(form, num_frames=2).frames, frames[[0, 3]])
    assert read_video(frames[..., :1]).frames.shape == (4, 56, 56, 3)


def test_metadata_follows_the_chosen_frames():
    times = {"fps": 2.0, "total_num_frames": 40, "duration": 20.0, "frames_indices": [0, 10, 20, 30]}
    video = read_video({"array": clip(4), "video_metadata": times}, num_frames=2)
    assert video.metadata == {**times, "frames_indices": [0, 30]}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no frames"),
        (np.zeros((0, 28, 28, 3), np.uint8), "at least one of each"),
        (np.zeros((2, 28, 28), np.uint8), "must be .frames, height, width, channels."),
        (np.full((2, 2, 2, 3), np.nan), r"24 NaN or infinite values, the first at \(0, 0, 0, 0\)"),
        ([picture(28, 28), picture(56, 28)], r"of one size, got \[\(28, 28\), \(56, 28\)\]"),
        ([picture(28, 28), np.full((2, 2, 3), np.nan)], "frame 1: .*NaN"),
        ({"array": clip(2), "fps": 2}, 'keys "array" and "video_metadata", got'),
        (3, "a int is no video"),
    ],
)
def test_what_is_no_video(source, message):
    with pytest.raises(ValueError, match=message):
        read_video(source)


def test_num_frames_must_be_positive():
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        read_video(clip(2), num_frames=0)


def test_broken_files(tmp_path, movie):
    data = movie.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"not a video")
    for name in ("cut.mp4", "empty.mp4", "text.mp4"):
        for read in (read_video, checked):
            with pytest.raises(ValueError, match=f"{name}' (can't be decoded as a video: .*Make|has no video stream)"):
                read(tmp_path / name)
    for read in (read_video, checked):
        with pytest.raises(ValueError, match="nowhere.mp4' does not exist"):
            read(tmp_path / "nowhere.mp4")


def test_files_without_frames_or_without_pictures(tmp_path):
    av = pytest.importorskip("av", reason="PyAV (extra `video`) decodes video files")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="sound.wav' has no video stream"):
        read_video(tmp_path / "sound.wav")
    write_movie(tmp_path / "none.avi", levels=())
    with pytest.raises(ValueError, match="none.avi' has no video frames. Leave it out"):
        read_video(tmp_path / "none.avi")


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damage_behind_a_good_header(tmp_path, damage):
    """A clip that can't be decoded to its end is an error, not a shorter clip."""
    data = bytearray(write_movie(tmp_path / "movie.avi", levels=LEVELS * 4).read_bytes())
    middle = len(data) // 2
    data[middle:] = b"" if damage == "cut" else b"\xff" * (len(data) - middle)
    with pytest.raises(ValueError, match="can't be decoded as a video|is cut short"):
        read_video(bytes(data), num_frames=48)


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(data=st.data())
def test_damage_is_a_video_or_a_value_error(movie, data):
    damaged = bytearray(movie.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    source = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        assert read_video(source).frames.ndim == 4
    except ValueError as error:
        assert str(error).startswith("the bytes")
