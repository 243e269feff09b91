"""Videos as the checked path reads them: files, arrays or lists of frames, to (F, H, W, 3) uint8 on one rule.

What a plain `encode` makes of frame counts differs by family (measured, transformers 5.23): Qwen2-VL, Qwen2.5-VL,
Qwen2.5-Omni, LLaVA-OneVision, InternVL and SmolVLM use every frame; Qwen3-VL and Qwen3.5 take an array without frame
rate for 24 frames a second and keep 2 of each second, at least 4, and refuse `num_frames`; so does SmolVLM. The pixel
budget (`size`) counts the whole video for the Qwens and has no effect on LLaVA-OneVision and InternVL.
Here frames are chosen and shrunk before any processor sees them, so `num_frames` and `max_pixels` mean the same
everywhere; the processor's own resizing comes after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from st_btok.inputs.fetch import read_source, source_name
from st_btok.inputs.images import formats, is_postscript, normalise, rgb_image, shrink
from st_btok.inputs.pixels import channels_last, to_bytes

# FFmpeg's names. Not on the list: playlists (hls, concat, dash), numbered images, text drawn as a terminal (tty).
CONTAINERS = "mov,mp4,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,m4v,h264,hevc,av1,ivf,nut,mxf,dv,rm,wav"
FILE_FRAMES = 8  # the authors' count, and what `limits.py` reserves room for
LARGEST_FRAME = 2**25  # pixels; 8K. A decoder holds several whole frames
# Pixels of all chosen frames of a file: eight of 4 million, as processors hold each 12 bytes. More frames than eight
# are asked for by the user, who gets each in at least half a million.
_FILE_PIXELS, _LEAST_PIXELS = 2**25, 2**19


@dataclass(frozen=True)
class Video:
    """Decoded frames.

    Attributes:
        frames: (F, H, W, 3) uint8, F at least 2: a single frame is doubled, because Qwen3-VL refuses one.
        metadata: Frame rate and numbers of the frames, in sentence-transformers' form; None where the source tells
            no frame rate.
    """

    frames: np.ndarray
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
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    metadata = None
    if isinstance(source, dict):
        unknown = set(source) - {"array", "video_metadata"}
        if unknown or "array" not in source:
            raise ValueError(f'a video dict has the keys "array" and "video_metadata", got {sorted(map(str, source))}')
        source, metadata = source["array"], source.get("video_metadata")
    if isinstance(source, np.ndarray | torch.Tensor):
        frames, metadata = _choose(_from_array(source), num_frames, metadata)
    elif isinstance(source, list | tuple):
        if not source:
            raise ValueError("the video has no frames. Leave it out")
        chosen, metadata = _choose(source, num_frames, metadata)
        frames = _stack(
            [_frame(frame, index, max_pixels, allow_urls, background) for index, frame in enumerate(chosen)]
        )
    elif isinstance(source, str | Path | bytes):
        frames, metadata = _from_file(source, num_frames or FILE_FRAMES, max_pixels, allow_urls, background)
    else:
        raise ValueError(f"a {type(source).__name__} is no video. Pass a path, an array or a list of frames")
    if max_pixels is not None and frames.shape[1] * frames.shape[2] > max_pixels:
        frames = _stack([shrink(Image.fromarray(frame), max_pixels) for frame in frames])
    if len(frames) == 1:
        frames = np.repeat(frames, 2, axis=0)
        metadata = metadata and {**metadata, "frames_indices": [*metadata["frames_indices"]] * 2}
    return Video(frames, metadata)


def check_video(source: Any) -> None:
    """Check that a file holds a video, without decoding it.

    Args:
        source: Path or bytes.

    Raises:
        ImportError: If PyAV is missing.
        ValueError: If it is not a video, has no frames, or its frames are too large.
    """
    opened = read_source(source)
    try:
        with Image.open(opened, formats=formats()):
            return
    except Exception:  # no image, or a damaged one: what Pillow raises for damage differs by format
        _refuse_postscript(opened, source)
        opened = read_source(source)
    av = _pyav()
    try:
        with _container(opened) as container:
            _stream(container, source)
    except av.FFmpegError as error:
        raise _no_video(source, error) from error


def _choose(frames: Any, num_frames: int | None, metadata: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Evenly spaced frames, and the metadata that belongs to them."""
    if num_frames is None or len(frames) <= num_frames:
        return frames, metadata
    picks = evenly(len(frames), num_frames)
    if metadata is not None:
        numbers = metadata.get("frames_indices")
        numbers = list(range(len(frames))) if numbers is None else numbers
        metadata = {**metadata, "frames_indices": [int(numbers[pick]) for pick in picks]}
    return (frames[picks] if isinstance(frames, np.ndarray) else [frames[pick] for pick in picks]), metadata


def evenly(total: int, num_frames: int) -> list[int]:
    """Numbers of evenly spaced frames, first and last included, rounded down, as MMEB-V2's own harness chooses them.

    Args:
        total: Frames there are.
        num_frames: Frames to take, at least 1; of one frame it is the middle one.

    Returns:
        `min(total, num_frames)` ascending numbers.
    """
    if num_frames == 1:
        return [total // 2]
    return np.linspace(0, total - 1, min(total, num_frames)).astype(int).tolist()


def _from_array(source: np.ndarray | torch.Tensor) -> np.ndarray:
    shape = tuple(source.shape)
    what = f"the video {type(source).__name__} of shape {shape}"
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{what} must be (frames, height, width, channels) with at least one of each")
    values = channels_last(to_bytes(source, what), isinstance(source, torch.Tensor), what)
    if values.shape[-1] == 3:
        return values
    return _stack([rgb_image(frame) for frame in values])


def _frame(frame: Any, index: int, max_pixels: int | None, allow_urls: bool, background: str | None) -> Image.Image:
    try:
        return rgb_image(frame, max_pixels, allow_urls, background)
    except ValueError as error:
        raise ValueError(f"frame {index}: {error}") from error


def _stack(frames: Sequence[Image.Image]) -> np.ndarray:
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"the frames of a video must be of one size, got {sorted(sizes)}. Resize them")
    return np.stack([np.asarray(frame) for frame in frames])


def _from_file(
    source: str | Path | bytes, num_frames: int, max_pixels: int | None, allow_urls: bool, background: str | None
) -> tuple[np.ndarray, dict[str, Any] | None]:
    opened = read_source(source, allow_urls)
    room = max(_FILE_PIXELS // num_frames, _LEAST_PIXELS)
    max_pixels = room if max_pixels is None else min(max_pixels, room)
    try:
        with Image.open(opened, formats=formats()) as image:
            _check_size(image.width, image.height, source)
            total = getattr(image, "n_frames", 1)
            picks = set(evenly(total, num_frames))
            frames = enumerate(ImageSequence.Iterator(image))
            chosen = [shrink(normalise(frame, background), max_pixels) for i, frame in frames if i in picks]
            return _stack(chosen), None
    except UnidentifiedImageError:
        _refuse_postscript(opened, source)
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise _no_video(source, error) from error
    if not isinstance(opened, Path):
        opened.seek(0)
    return _decode(opened, source, num_frames, max_pixels)


def _decode(
    opened: Any, source: Any, num_frames: int, max_pixels: int | None
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Decode the chosen frames of a video file, in one pass up to the last of them."""
    av = _pyav()
    try:
        with _container(opened) as container:
            stream = _stream(container, source)
            rate = float(stream.average_rate or stream.guessed_rate or 0) or None
            total = sum(1 for packet in container.demux(stream) if packet.size)
            if not total:
                raise ValueError(f"{source_name(source)} has no video frames. Leave it out")
            picks = evenly(total, num_frames)
            container.seek(0)
            frames = []
            for index, frame in enumerate(container.decode(stream)):
                if index in picks:
                    upright = frame.to_image()
                    if frame.rotation:
                        upright = upright.rotate(frame.rotation, expand=True)
                    frames.append(rgb_image(upright, max_pixels))
                if index >= picks[-1]:
                    break
    except av.FFmpegError as error:
        raise _no_video(source, error) from error
    if len(frames) < len(picks):
        raise ValueError(
            f"{source_name(source)} is cut short: {total} frames are announced, of the {len(picks)} chosen ones only "
            f"{len(frames)} can be decoded. Make the file again"
        )
    times: dict[str, Any] | None = {"fps": rate, "total_num_frames": total, "duration": total / rate} if rate else None
    return _stack(frames), None if times is None else {**times, "frames_indices": picks}


def _stream(container: Any, source: Any) -> Any:
    stream = container.streams.video[0] if container.streams.video else None
    if stream is None or stream.codec_context is None:
        raise ValueError(f"{source_name(source)} has no video stream that can be decoded. Leave it out")
    _check_size(stream.width, stream.height, source)
    return stream


def _refuse_postscript(opened: Any, source: Any) -> None:
    if is_postscript(opened):
        raise ValueError(f"{source_name(source)} is PostScript. Convert it to PNG")


def _check_size(width: int, height: int, source: Any) -> None:
    if not 1 <= width * height <= LARGEST_FRAME:
        raise ValueError(
            f"{source_name(source)} has frames of {width} x {height} pixels; at least 1 and at most "
            f"{LARGEST_FRAME} can be read. Shrink it first"
        )


def _container(opened: Any) -> Any:
    """A video file, if it is of a kind that holds its own frames: playlists would open other files and addresses."""
    return _pyav().open(opened, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def _no_video(source: Any, error: Exception) -> ValueError:
    return ValueError(f"{source_name(source)} can't be decoded as a video: {error}. Make the file again")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("video files are decoded by PyAV. Install it with `pip install st_btok[video]`") from error
    return av
