"""Reading one input for one model: a text, a medium, a dict of them, or a conversation is checked and decoded.

Every problem is a ValueError that says what was seen and what to do; `encode.py` adds the row number. Media are read
by the rules of `images.py` and `videos.py`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import (
    is_audio_url_or_path,
    is_image_url_or_path,
    is_message_dict,
    is_video_url_or_path,
)
from transformers import PreTrainedTokenizerBase

from st_btok.inputs.fetch import ADDRESSES, MediaOptions, Opened, open_source
from st_btok.inputs.images import check_image, decode_image
from st_btok.inputs.videos import check_video, decode_video
from st_btok.tokens import btok_ids

_MEDIA = ("image", "video", "audio")
_PAGES = "Pass its pages: pdf_pages(path)"
# Not `mimetypes`, which says something else on each machine.
_SUFFIXES = {
    "image": "apng avif avifs bmp cur dds dib eps fits gif heic heif hif icns ico j2k jfif jp2 jpe jpeg jpg jpx pbm "
    "pcx pgm png pnm ppm psd qoi sgi svg tga tif tiff webp xbm xpm",
    "video": "3g2 3gp asf avi flv m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf ogv vob webm wmv",
    "audio": "aac aif aiff flac m4a mp3 oga ogg opus wav wma",
    "pages": "pdf",
}
_KINDS = {f".{suffix}": kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


@dataclass(frozen=True)
class InputReader:
    """Reads one row for one model."""

    modalities: tuple[Any, ...]  # what the model takes, such as ("text", "image", "message")
    flat: bool = False  # whether its chat template wants a turn's content as one string
    placeholders: tuple[str, ...] = ()  # media tokens that text must not forge; none where the template guards
    media: MediaOptions = MediaOptions()
    decode: bool = True  # else headers of files are checked, no URL is fetched, and media become None

    def read(self, value: Any) -> Any:
        """One input, checked, as sentence-transformers takes it; a `ValueError` if it is no input of this model."""
        if isinstance(value, ValueError):  # found where the row was made, such as a page that can't be drawn
            raise value
        if isinstance(value, str):
            return self._bare(value)
        if isinstance(value, Path):
            return self._media(_kind_of_file(value), value)
        if isinstance(value, Image.Image):
            return self._media("image", value)
        if isinstance(value, np.ndarray | torch.Tensor):
            kind = {1: "audio", 2: "audio", 3: "image", 4: "video"}.get(value.ndim)
            if kind is None:
                raise ValueError(
                    f"an array of shape {tuple(value.shape)} is no input. 1 or 2 axes are audio, 3 an image, 4 a video"
                )
            return self._media(kind, value)
        turns = value if isinstance(value, list) else [value]
        if turns and is_message_dict(turns[0]):
            return self._conversation(turns)
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, list | tuple):
            raise ValueError(
                f'a {type(value).__name__} of {len(value)} is no single input. Pass several images as {{"image": '
                '[...]}, frames as {"video": [...]}, a conversation as a list of {"role": ..., "content": ...}'
            )
        hint = 'say what they are, as in {"image": ...}' if isinstance(value, bytes) else "leave the row out"
        missing = value is None or (isinstance(value, float) and value != value)
        seen = f"a missing value ({value})" if missing else type(value).__name__
        raise ValueError(f"got {seen}; text, an image, an array or a dict is needed. Or {hint}")

    def _bare(self, value: str) -> Any:
        """A string: text, or the path or URL of a medium, as in sentence-transformers but with more kinds of files."""
        tests = (("image", is_image_url_or_path), ("video", is_video_url_or_path), ("audio", is_audio_url_or_path))
        for kind, test in tests:
            if kind in self.modalities and test(value):
                if value.startswith(ADDRESSES) and not self.media.allow_urls:
                    raise ValueError(
                        f"{value[:200]!r} is the URL of an {kind}, and URLs are not fetched. Download it, pass "
                        'allow_urls=True, or pass {"text": ...} to embed the words'
                    )
                return self._media(kind, value)
        kind = _kind_of_name(value)
        path_like = len(value) < 4096 and (len(value.split()) == 1 or "/" in value or "\\" in value)
        if not path_like or value.startswith(ADDRESSES) or "\0" in value:
            return self._text(value)
        if kind == "pages" and "image" in self.modalities and os.path.isfile(value):
            raise ValueError(f'{value[:200]!r} is a document. {_PAGES}, or pass {{"text": ...}} to embed the words')
        if kind not in self.modalities:
            return self._text(value)
        if not os.path.isfile(value):
            raise ValueError(
                f'{value[:200]!r} looks like {kind} file, but there is none. Check the path, or pass {{"text": ...}} '
                "to embed the words"
            )
        return self._media(kind, value)

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"text must be a string, got {type(value).__name__}. Pass '' for no text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a character (a lone surrogate) at {error.start}: {value[:40]!a}. Decode it "
                'again with errors="replace"'
            ) from error
        for name in self.placeholders:
            value = value.replace(name, f"{name[0]} {name[1:]}")
        return value

    def _dict(self, value: dict) -> Any:
        if "array" in value:
            kind = "audio" if "sampling_rate" in value else "video"
            return self._media(kind, value)
        unknown = sorted(str(key) for key in value if key not in ("text", *_MEDIA))
        if unknown or not value:
            raise ValueError(
                f"a dict input has the keys text, image, video, audio, got {unknown or 'none'}. Rename or drop them"
            )
        return {kind: self._named(kind, item) for kind, item in value.items()}

    def _named(self, kind: str, item: Any) -> Any:
        """The value under one key of a dict: one item or a list of them."""
        if isinstance(item, list | tuple) and not (kind == "video" and _are_frames(item)):
            if not item:
                raise ValueError(f"{kind} is an empty list. Leave the key out")
            return [self._item(kind, part, f"{kind} {index}: ") for index, part in enumerate(item)]
        return self._item(kind, item, f"{kind}: ")

    def _item(self, kind: str, item: Any, where: str) -> Any:
        try:
            return self._text(item) if kind == "text" else self._media(kind, item)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    def _media(self, kind: str, source: Any) -> Any:
        if kind not in self.modalities:
            takes = ", ".join(str(modality) for modality in self.modalities)
            raise ValueError(f"this model takes {takes}, not {kind}. Leave the {kind} out, or use another backbone")
        if source is None:
            raise ValueError(f"the {kind} is None. Leave it out")
        if not self.decode and self.media.allow_urls and isinstance(source, str) and source.startswith(ADDRESSES):
            return None
        with open_source(source, self.media.allow_urls and kind != "audio") as opened:
            if kind == "audio":
                return self._audio(opened, source)
            if not self.decode:
                return check_image(opened) if kind == "image" else check_video(opened, self.media)
            if kind == "image":
                return decode_image(opened, self.media)
            video = decode_video(opened, self.media)
        return video.frames if video.metadata is None else {"array": video.frames, "video_metadata": video.metadata}

    def _audio(self, opened: Opened, source: Any) -> Any:
        if isinstance(opened.file, io.BufferedReader):
            return str(source)  # the model's own processor decodes files
        values = source.get("array") if isinstance(source, dict) else source
        if isinstance(source, dict) and not (source.get("sampling_rate") or 0) > 0:
            raise ValueError(f"sampling_rate must be above 0, got {source.get('sampling_rate')}. Pass the rate in Hz")
        if not isinstance(values, np.ndarray | torch.Tensor) or values.ndim not in (1, 2) or 0 in values.shape:
            shape = getattr(values, "shape", type(values).__name__)
            raise ValueError(f"audio must be an array of (samples,) or (channels, samples), got {shape}. Leave it out")
        finite = torch.as_tensor(values).isfinite()
        if not finite.all():
            raise ValueError(f"the audio holds {int((~finite).sum())} NaN or infinite values. Repair it")
        return source

    def _conversation(self, turns: list[Any]) -> list[dict[str, Any]]:
        if "message" not in self.modalities:
            raise ValueError("this model has no chat template, so it takes no conversations. Pass the text alone")
        checked = []
        for number, turn in enumerate(turns):
            try:
                if not is_message_dict(turn) or not isinstance(turn["role"], str):
                    raise ValueError('must be a dict {"role": ..., "content": ...} with a string as role')
                content = turn["content"]
                if isinstance(content, list | tuple):
                    content = [self._part(part, index) for index, part in enumerate(content)]
                    if self.flat and all(part["type"] == "text" for part in content):
                        content = "".join(part["text"] for part in content)
                else:
                    content = self._text(content)
            except ValueError as error:
                raise ValueError(f"turn {number}: {error}") from error
            checked.append({**turn, "content": content})
        return checked

    def _part(self, part: Any, index: int) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", *_MEDIA):
            raise ValueError(
                f"part {index} must have the type text, image, video or audio, got {kind!r}. Fix its type"
            )
        keys = [key for key in (kind, "url", "path", "base64") if key in part]
        if len(keys) != 1:
            raise ValueError(f"part {index} must hold one {kind} under the key {kind!r}, got {sorted(part)}. Add it")
        source = f"data:;base64,{part['base64']}" if keys == ["base64"] else part[keys[0]]
        item = self._item(kind, source, f"part {index}: ")
        if kind == "video" and isinstance(item, dict):  # sentence-transformers has no place for frame times in a turn
            item = item["array"]
        return {**{key: value for key, value in part.items() if key not in keys}, kind: item}


def reader_for(model: SentenceTransformer, media: MediaOptions | None = None, decode: bool = True) -> InputReader:
    """A reader that knows what a model takes."""
    formatter = getattr(model[0], "input_formatter", None)
    return InputReader(
        modalities=tuple(model.modalities),
        flat=getattr(formatter, "message_format", "structured") == "flat",
        placeholders=_unguarded_placeholders(model),
        media=media or MediaOptions(),
        decode=decode,
    )


def _unguarded_placeholders(model: SentenceTransformer) -> tuple[str, ...]:
    """Media tokens that text could forge; none for BTok models, whose chat template guards text itself."""
    processor, tokenizer = getattr(model[0], "processor", None), getattr(model[0], "tokenizer", None)
    # Bags of words and static embeddings have tokenizers of their own kind, without media.
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or btok_ids(tokenizer):
        return ()
    names = [getattr(processor, f"{kind}_token", None) for kind in _MEDIA]
    return tuple(name for name in names if isinstance(name, str) and len(name) > 1)


def _kind_of_name(name: str | Path) -> str:
    """`image`, `video`, `audio`, `pages` or nothing, by the suffix alone: the whole may be any text."""
    return _KINDS.get(os.path.splitext(name)[1].lower(), "")


def _kind_of_file(path: Path) -> str:
    kind = _kind_of_name(path)
    if kind not in _MEDIA:
        hint = _PAGES if kind == "pages" else 'Say it, as in {"image": path}'
        raise ValueError(f"the name {path.name!r} does not tell image, video or audio. {hint}")
    return kind


def _are_frames(items: Sequence[Any]) -> bool:
    """Whether a list under `video` is one video's frames; otherwise it is a list of videos. Nothing is a video."""
    return all(
        isinstance(item, Image.Image)
        or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 3)
        or (isinstance(item, str | Path) and _kind_of_name(item) == "image")
        for item in items
    )
