"""Reading videos in the checked path: files, arrays and lists of frames all become (F, H, W, 3) uint8, by one rule.

In plain `encode`, which frames are used differs by family (measured, transformers 5.23): Qwen2-VL, Qwen2.5-VL,
Qwen2.5-Omni, LLaVA-OneVision, InternVL and SmolVLM use every frame; Qwen3-VL and Qwen3.5 take an array without frame
rate for 24 frames a second and keep 2 of each second, at least 4, and refuse `num_frames`; so does SmolVLM. The pixel
budget (`size`) counts the whole video for the Qwens and has no effect on LLaVA-OneVision and InternVL.
Here frames are chosen and shrunk before any processor sees them, so `num_frames` and `max_pixels` mean the same
everywhere; the processor's own resizing comes after that.

The frames of a file are those that a player shows: turned, mirrored and widened as the file says, without those that
an edit list cuts off or that a missing start leaves undecodable. They are evenly spaced in time. If all frames last
equally long, that is evenly by number, as in MMEB-V2's harness; if not, `frames_indices` are milliseconds.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from st_btok.inputs.fetch import ADDRESSES, MediaOptions, Opened, open_source
from st_btok.inputs.images import (
    channels_last,
    check_brightness,
    check_image,
    decode_image,
    formats,
    is_postscript,
    normalise,
    rgb_image,
    shrink,
    to_bytes,
)

# FFmpeg's names of what is opened. Left out are playlists (hls, concat, dash), numbered images and text drawn as a
# terminal (tty).
CONTAINERS = "mov,mp4,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,m4v,h264,hevc,av1,ivf,nut,mxf,dv,rm,wav"
FILE_FRAMES = 8  # the authors' count, and what `limits.py` reserves room for
LARGEST_FRAME = 2**25  # pixels; 8K. A decoder holds several whole frames
# Pixels of all chosen frames of a file together, of which processors hold 12 bytes each: 4 million for each of eight
# frames. A user who asks for more frames gets each with at least half a million.
_FILE_PIXELS, _LEAST_PIXELS = 2**25, 2**19
_SKIP = 32  # up to so many frames are decoded rather than jumped over
# How a display matrix turns a frame, by the signs of (a, b, c, d) in x' = ax + cy, y' = bx + dy.
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Video:
    """Decoded frames.

    `metadata` has frame rate and numbers of the frames, in sentence-transformers' form; number / rate is the time of a
    frame in seconds. None where the source tells no frame rate.
    """

    frames: np.ndarray  # (F, H, W, 3) uint8, F at least 2: a single frame is doubled, because Qwen3-VL refuses one
    metadata: dict[str, Any] | None = None


def read_video(
    source: Any,
    num_frames: int | None = None,
    max_pixels: int | None = None,
    allow_urls: bool = False,
    background: str | None = None,
) -> Video:
    """Read a video.

    Args:
        source: Path, URL or bytes of a video or an animated image; an array or tensor (F, H, W, C) or (F, C, H, W);
            a list of frames (anything `rgb_image` takes, all of one size); or `{"array": ..., "video_metadata": ...}`
            around an array or list.
        num_frames: At most this many frames (at least 1), as `evenly` chooses them. Default: 8 of a file, every frame
            of an array or list.
        max_pixels: Largest area of one frame; larger ones are shrunk. Default: of a file 2^25 pixels over the number
            of frames (4 million at 8 frames), else no shrinking.
        allow_urls: Fetch URLs.
        background: See `rgb_image`.

    Returns:
        The chosen frames.

    Raises:
        ImportError: If a video file is to be read and PyAV is missing.
        ValueError: If there are no frames, they differ in size, or can't be decoded.
    """
    media = MediaOptions(allow_urls, num_frames, max_pixels, background)
    with open_source(source, allow_urls) as opened:
        return decode_video(opened, media)


def decode_video(opened: Opened, media: MediaOptions) -> Video:
    """The chosen frames of an opened file, or of what `read_video` takes besides files; errors as there."""
    if opened.file is not None:
        frames, metadata = _from_file(opened, opened.file, media)
    else:
        source, metadata = _unwrapped(opened)
        source, metadata = _choose(source, media.num_frames, metadata)
        if isinstance(source, list | tuple):
            decoded = []
            for index, frame in enumerate(source):
                with _frame_errors(index), open_source(frame, media.allow_urls) as one:
                    decoded.append(decode_image(one, media))
            frames = _stack(decoded)
        else:
            frames = _from_array(source)
    if media.max_pixels is not None and frames.shape[1] * frames.shape[2] > media.max_pixels:
        frames = _stack([shrink(Image.fromarray(frame), media.max_pixels) for frame in frames])
    if len(frames) == 1:
        frames = np.repeat(frames, 2, axis=0)
        metadata = metadata and {**metadata, "frames_indices": [*metadata["frames_indices"]] * 2}
    return Video(frames, metadata)


def check_video(opened: Opened, media: MediaOptions) -> None:
    """Find what is wrong with a video without decoding it; URLs of frames that may be fetched are left alone.

    An `ImportError` if PyAV is missing, a `ValueError` if it is no video, has no frames, or its frames are too large.
    """
    if opened.file is not None:
        if _animation(opened, opened.file) is None:
            with _container(opened, opened.file) as container:
                _stream(container, opened)
        return
    source, _ = _unwrapped(opened)
    if not isinstance(source, list | tuple):
        check_brightness(source, _check_array(source))
        return
    for index, frame in enumerate(source):
        if not (media.allow_urls and isinstance(frame, str) and frame.startswith(ADDRESSES)):
            with _frame_errors(index), open_source(frame) as one:
                check_image(one)


def _unwrapped(opened: Opened) -> tuple[Any, dict[str, Any] | None]:
    """Frames as an array, tensor, list or tuple, and their metadata."""
    source, metadata = opened.value, None
    if isinstance(source, dict):
        unknown = set(source) - {"array", "video_metadata"}
        if unknown or "array" not in source:
            raise ValueError(f'a video dict has the keys "array" and "video_metadata", got {sorted(map(str, source))}')
        source, metadata = source["array"], source.get("video_metadata")
    if isinstance(source, np.ndarray | torch.Tensor):
        _check_array(source)
    elif not isinstance(source, list | tuple):
        raise ValueError(f"a {type(source).__name__} is no video. Pass a path, an array or a list of frames")
    elif not source:
        raise ValueError("the video has no frames. Leave it out")
    return source, metadata


def _choose(frames: Any, num_frames: int | None, metadata: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Evenly spaced frames, and the metadata that belongs to them."""
    if num_frames is None or len(frames) <= num_frames:
        return frames, metadata
    picks = evenly(len(frames), num_frames)
    if metadata is not None:
        numbers = metadata.get("frames_indices")
        numbers = list(range(len(frames))) if numbers is None else numbers
        metadata = {**metadata, "frames_indices": [int(numbers[pick]) for pick in picks]}
    return ([frames[i] for i in picks] if isinstance(frames, list | tuple) else frames[picks]), metadata


def evenly(total: int, num_frames: int) -> list[int]:
    """Numbers of evenly spaced frames, first and last included, rounded down, as MMEB-V2's own harness chooses them.

    `min(total, num_frames)` ascending numbers; of one frame it is the middle one.
    """
    if num_frames == 1:
        return [total // 2]
    return np.linspace(0, total - 1, min(total, num_frames)).astype(int).tolist()


def _check_array(source: np.ndarray | torch.Tensor) -> str:
    """Check the shape of an array of frames; its name in errors comes back."""
    shape = tuple(source.shape)
    what = f"the video {type(source).__name__} of shape {shape}"
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{what} must be (frames, height, width, channels) with at least one of each")
    return what


def _from_array(source: np.ndarray | torch.Tensor) -> np.ndarray:
    what = _check_array(source)
    values = channels_last(to_bytes(source, what), isinstance(source, torch.Tensor), what)
    if values.shape[-1] == 3:
        return np.ascontiguousarray(values)
    return _stack([rgb_image(frame) for frame in values])


@contextmanager
def _frame_errors(index: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"frame {index}: {error}") from error


def _stack(frames: Sequence[Image.Image]) -> np.ndarray:
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"the frames of a video must be of one size, got {sorted(sizes)}. Resize them")
    return np.stack([np.asarray(frame) for frame in frames])


def _animation(opened: Opened, file: IO[bytes]) -> Image.Image | None:
    """An image, animated or not, that is not decoded yet; None where the file is something else, such as a film."""
    if is_postscript(file.read(4)):
        raise ValueError(f"{opened.name} is PostScript. Convert it to PNG")
    file.seek(0)
    try:
        image = Image.open(file, formats=formats())
    except UnidentifiedImageError:
        return None
    except Exception as error:  # a damaged image: what Pillow raises differs by format
        raise _no_video(opened, error) from error
    _check_size(image.width, image.height, opened)
    return image


def _from_file(opened: Opened, file: IO[bytes], media: MediaOptions) -> tuple[np.ndarray, dict[str, Any] | None]:
    num_frames = media.num_frames or FILE_FRAMES
    room = max(_FILE_PIXELS // num_frames, _LEAST_PIXELS)
    max_pixels = min(media.max_pixels or room, room)
    image = _animation(opened, file)
    if image is None:
        return _decode(opened, file, num_frames, max_pixels)
    try:
        total = 1 if image.format == "PSD" else getattr(image, "n_frames", 1)  # a PSD's are layers
        picks = set(evenly(total, num_frames))
        frames = enumerate(ImageSequence.Iterator(image)) if total > 1 else enumerate([image])
        chosen = [shrink(normalise(frame, media.background), max_pixels) for i, frame in frames if i in picks]
        return _stack(chosen), None
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise _no_video(opened, error) from error


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a file are shown."""

    times: list[int]  # ascending times of all frames, in units of `base`
    keys: list[int]  # times of those at which decoding can begin
    base: Fraction  # seconds
    rate: float | None  # frames a second, as the file announces them

    def gap(self) -> int:
        """The time from one frame to the next: the median."""
        return int(np.median(np.diff(self.times))) if len(self.times) > 1 else 0

    def is_constant(self) -> bool:
        """Whether all frames last alike, but for the rounding of their times."""
        gaps = np.diff(self.times)
        return not len(gaps) or bool((np.abs(gaps - np.median(gaps)) <= 1 + 0.1 * np.median(gaps)).all())

    def picks(self, num_frames: int) -> list[int]:
        """Numbers of the frames that are shown at evenly spaced times; see `evenly`."""
        total, first, last = len(self.times), self.times[0], self.times[-1]
        if self.is_constant() or num_frames >= total:
            return evenly(total, num_frames)
        spots = np.linspace(first, last, num_frames) if num_frames > 1 else [(first + last + self.gap()) / 2]
        slack = float(Fraction(1, 1000) / self.base)  # as times are rounded
        return [bisect_right(self.times, spot + slack) - 1 for spot in spots]

    def metadata(self, picks: Sequence[int]) -> dict[str, Any] | None:
        """Rate and numbers, of which number / rate is the time."""
        total, seconds = len(self.times), float((self.times[-1] - self.times[0] + self.gap()) * self.base)
        if not self.is_constant():
            numbers = [round(1000 * (self.times[pick] - self.times[0]) * self.base) for pick in picks]
            total, rate = round(1000 * seconds), 1000.0
            return {"fps": rate, "total_num_frames": total, "duration": seconds, "frames_indices": numbers}
        rate = self.rate or 0.0
        if total > 1 and seconds and not (rate and abs(rate * seconds / total - 1) < 0.01):
            rate = total / seconds
        if not rate:
            return None
        return {"fps": rate, "total_num_frames": total, "duration": total / rate, "frames_indices": list(picks)}


def _decode(
    opened: Opened, file: IO[bytes], num_frames: int, max_pixels: int
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The chosen frames of a video file: by the times of its packets, or, where those mislead, of all its frames."""
    with _container(opened, file) as container:
        stream = _stream(container, opened)
        timeline, end = _packet_times(container, stream, opened)
        if timeline is not None:
            picks = timeline.picks(num_frames)
            frames = _frames_at(container, stream, timeline, picks, max_pixels)
            if frames is not None:
                return _stack(frames), timeline.metadata(picks)
    # A frame was not where a packet is: two of them make one frame, there are no times, or some can't be decoded.
    with _container(opened, file) as container:
        timeline = _frame_times(container, _stream(container, opened), end, opened)
    picks, chosen = timeline.picks(num_frames), {}
    with _container(opened, file) as container:
        stream = _stream(container, opened)
        for number, frame in enumerate(container.decode(stream)):
            if number in picks:
                chosen[number] = _shown(frame, stream, max_pixels)
            if number >= picks[-1]:
                break
    return _stack(_of_one_size([chosen[pick] for pick in picks])), timeline.metadata(picks)


def _packet_times(container: Any, stream: Any, opened: Opened) -> tuple[_Timeline | None, int | None]:
    """When frames are due, by the packets, none of which is decoded; and the last such time."""
    # The packets themselves are let go: together they are the whole file.
    packets = [
        (packet.pts, packet.is_keyframe, packet.is_discard) for packet in container.demux(stream) if packet.size
    ]
    if not packets and not stream.frames:
        raise ValueError(f"{opened.name} has no video frames. Leave it out")
    if len(packets) < 0.9 * stream.frames:
        raise ValueError(
            f"{opened.name} is cut short: {stream.frames} frames are announced, {len(packets)} are there. Make the "
            "file again"
        )
    keys = [pts for pts, is_key, _ in packets if is_key and pts is not None]
    due = [pts for pts, _, is_discarded in packets if not is_discarded]
    known = [pts for pts in due if pts is not None]
    if not keys or not known or len(known) < len(due):
        return None, max(known, default=None)
    # What comes before the first key frame refers to frames that are not there: a player begins with that.
    times = sorted({pts for pts in known if pts >= keys[0]})
    timeline = _Timeline(times, sorted(keys), Fraction(stream.time_base), _rate(stream)) if times else None
    return timeline, max(known)


def _frame_times(container: Any, stream: Any, end: int | None, opened: Opened) -> _Timeline:
    """When frames are shown, found by decoding all of them."""
    times = [frame.pts for frame in container.decode(stream)]
    rate = _rate(stream)
    if not times:
        raise ValueError(f"{opened.name} has no video frames that can be decoded. Leave it out")
    if None in times or sorted(set(times)) != times:
        rate = float(stream.guessed_rate or 0) or rate  # the codec's own; a raw stream's average is a default
        return _Timeline(list(range(len(times))), [], 1 / Fraction(rate or 1).limit_denominator(10**6), rate)
    timeline = _Timeline(times, [], Fraction(stream.time_base), rate)
    if end is not None and end - times[-1] > 2 * timeline.gap() + 0.02 * (end - times[0]):
        shown, due = (float((time - times[0]) * timeline.base) for time in (times[-1], end))
        raise ValueError(
            f"{opened.name} is cut short: of {due:.2f} s only {shown:.2f} can be decoded. Make the file again"
        )
    return timeline


def _frames_at(
    container: Any, stream: Any, timeline: _Timeline, picks: list[int], max_pixels: int
) -> list[Image.Image] | None:
    """The frames due at chosen times, jumping to the key frame before each; None if one is not there."""
    found: dict[int, Image.Image] = {}
    frames: Iterator[Any] = iter(())
    at = None  # the number of the frame that was decoded last
    for pick in dict.fromkeys(picks):
        time = timeline.times[pick]
        key = timeline.keys[max(bisect_right(timeline.keys, time) - 1, 0)]
        skipped = bisect_right(timeline.times, key) - 1 - (-1 if at is None else at)
        if at is None or skipped > _SKIP:
            try:
                container.seek(key if skipped > _SKIP else timeline.keys[0], stream=stream)
            except OSError:  # such a stream can't be searched
                return None
            frames = container.decode(stream)
        shown = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
        if shown is None or shown.pts != time or shown.is_corrupt:
            return None
        found[pick], at = _shown(shown, stream, max_pixels), pick
    return _of_one_size([found[pick] for pick in picks])


def _rate(stream: Any) -> float | None:
    return float(stream.average_rate or stream.guessed_rate or 0) or None


def _shown(frame: Any, stream: Any, max_pixels: int) -> Image.Image:
    """A frame as a player shows it: its pixels made square, then mirrored or turned."""
    picture = frame.to_image()
    ratio = float(stream.sample_aspect_ratio or 1)
    width = round(picture.width * ratio)
    if width != picture.width and 0.1 < ratio < 10 and width * picture.height <= LARGEST_FRAME:
        picture = picture.resize((max(width, 1), picture.height), Image.Resampling.BICUBIC)
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), b"")
    if len(matrix) >= 36:
        a, b, _, c, d = struct.unpack("=5i", matrix[:20])
        largest = max(map(abs, (a, b, c, d))) or 1
        turn = _TURNS.get(tuple(round(value / largest) for value in (a, b, c, d)))
        if turn is not None:
            picture = picture.transpose(turn)
        elif frame.rotation % 90:
            picture = picture.rotate(frame.rotation, expand=True)
    return rgb_image(picture, max_pixels)


def _of_one_size(frames: list[Image.Image]) -> list[Image.Image]:
    """Frames of a stream that changes its size, in that of the first."""
    return [frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames]


def _stream(container: Any, opened: Opened) -> Any:
    """The stream that a player shows; a cover picture is none."""
    streams = [one for one in container.streams.video if "attached_pic" not in (one.disposition.name or "")]
    if not streams or streams[0].codec_context is None:
        raise ValueError(f"{opened.name} has no video stream that can be decoded. Leave it out")
    _check_size(streams[0].width, streams[0].height, opened)
    return streams[0]


def _check_size(width: int, height: int, opened: Opened) -> None:
    if not 1 <= width * height <= LARGEST_FRAME:
        raise ValueError(
            f"{opened.name} has frames of {width} x {height} pixels; at least 1 and at most {LARGEST_FRAME} can be "
            "read. Shrink it first"
        )


@contextmanager
def _container(opened: Opened, file: IO[bytes]) -> Iterator[Any]:
    """A video file, if it is of a kind that holds its own frames: playlists would open other files and addresses."""
    av = _pyav()
    file.seek(0)
    try:
        with av.open(file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}) as container:
            yield container
    except (av.FFmpegError, OSError) as error:  # the second from the file, when it is asked for impossible places
        raise _no_video(opened, error) from error


def _no_video(opened: Opened, error: Exception) -> ValueError:
    why = getattr(error, "strerror", None) or error
    return ValueError(f"{opened.name} can't be decoded as a video: {why}. Make the file again")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("video files are decoded by PyAV. Install it with `pip install av`") from error
    return av
