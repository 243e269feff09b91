"""Opening a medium: a path, bytes, base64 or a URL becomes an open stream. Nothing is decoded here.

URLs are fetched only if `allow_urls` says so, and only from public addresses. A name is resolved once, all of its
addresses must be public, and the connection goes to an address that was checked. So neither a redirect nor a name that
resolves differently the second time reaches a machine behind the firewall.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import re
import socket
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from PIL import ImageColor

ADDRESSES = ("http://", "https://")  # prefixes of a text that is a URL
_FETCH_SECONDS, _FETCH_BYTES, _PIECE = 30, 2**28, 2**16
# No part of it can match the same characters in two ways; else a long row of blanks would take quadratic time.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}(?:=\s*){0,2}")
# IPv6 addresses that stand for an IPv4 address. `ipaddress` itself knows only ::ffff:0:0/96, 6to4 and Teredo.
_NAT64, _COMPATIBLE = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")


@dataclass(frozen=True)
class MediaOptions:
    """How media are read.

    Attributes:
        allow_urls: Fetch URLs of media. Default: refuse them. (Plain `encode` fetches.)
        num_frames: At most this many evenly spaced frames of each video. Default: 8 of a file, all of other videos.
        max_pixels: Shrink images and frames to this area in pixels. Default: the model's own processor decides.
        background: Colour to lay transparent images over, such as `"white"`. Default: drop the transparency, as
            plain `encode` does, so that hidden colours show.

    Raises:
        ValueError: If a number is smaller than 1, or the colour is unknown.
    """

    allow_urls: bool = False
    num_frames: int | None = None
    max_pixels: int | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. Leave it out for no limit.")
        if self.background is not None:
            ImageColor.getrgb(self.background)  # a ValueError that names an unknown colour


@dataclass(frozen=True)
class Opened:
    """An open medium. A `with` block around it closes the file."""

    name: str  # in errors
    file: IO[bytes] | None = None  # a binary stream at its start; None where the source was an object
    value: Any = None  # that object; None where there is a file

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()


def open_source(source: Any, allow_urls: bool = False) -> Opened:
    """Open a path, URL, data URI, base64 or bytes; anything else is taken for a decoded object.

    URLs are fetched in 30 s in all, at most 256 MiB, from public addresses only. A `ValueError` if there is no such
    file, or a URL may not be fetched or can't be.
    """
    named = isinstance(source, str | Path)
    name = f"the file {str(source)[:200]!r}" if named else f"the {type(source).__name__}"
    if isinstance(source, bytes | bytearray | memoryview):
        return Opened(name, io.BytesIO(source))
    if isinstance(source, str) and source.startswith(ADDRESSES):
        if not allow_urls:
            raise ValueError(f"the URL {source!r} is not fetched. Download it first, or pass allow_urls=True")
        return Opened(name, io.BytesIO(fetch(source)))
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return Opened(name, io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"the data URI {source[:40]!r}... is not base64. Pass a path or bytes") from error
    return Opened(name, _open_path(source)) if named else Opened(name, value=source)


def _open_path(source: str | Path) -> IO[bytes]:
    """Open a file; a string that names no file but is base64 is decoded, as `encode` does."""
    path = Path(source)
    try:
        if path.is_file():
            return path.open("rb")
        is_folder = path.is_dir()
    except PermissionError as error:
        raise ValueError(f"the file {str(source)[:200]!r} may not be read. Change its permissions") from error
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte
        is_folder = False
    if isinstance(source, str) and not is_folder and _BASE64.fullmatch(source):
        try:
            return io.BytesIO(base64.b64decode(source))
        except binascii.Error:
            pass  # so it is a path that does not exist
    kind = "is a folder" if is_folder else "does not exist"
    raise ValueError(f"the file {str(source)[:200]!r} {kind}. Check the path")


def fetch(url: str) -> bytes:
    """Download from a public address.

    A `ValueError` if an address is private, or the answer fails, takes longer than 30 s or exceeds 256 MiB.
    """
    opener = urllib.request.OpenerDirector()
    # Neither proxies nor the handlers for files and ftp, which a redirect could lead to.
    for handler in (_HTTP, _HTTPS, urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor):
        opener.add_handler(handler())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    end, pieces, size = time.monotonic() + _FETCH_SECONDS, [], 0
    try:
        with opener.open(url, timeout=_FETCH_SECONDS) as answer:
            while piece := answer.read1(_PIECE):
                pieces.append(piece)
                size += len(piece)
                if size > _FETCH_BYTES:
                    raise ValueError(f"the URL {url!r} holds more than {_FETCH_BYTES} bytes. Download it first")
                if time.monotonic() > end:
                    raise ValueError(f"the URL {url!r} takes more than {_FETCH_SECONDS} s. Download it first")
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"the URL {url!r} can't be fetched: {error}. Download it first") from error
    return b"".join(pieces)


def _connect(connection: http.client.HTTPConnection) -> socket.socket:
    """A connection to an address that was found public."""
    found = socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if not _is_public(str(address[0])):
            raise OSError(f"{connection.host} has the private address {address[0]}")
    return socket.create_connection((str(found[0][4][0]), connection.port), connection.timeout)


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.is_site_local or found in _LOCAL_NAT64:
            return False
        carried = found.ipv4_mapped or found.sixtofour
        if carried is None and (found in _NAT64 or found in _COMPATIBLE):
            carried = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if carried is not None:
            return carried.is_global and not carried.is_multicast
    return found.is_global and not found.is_multicast


class _PublicHTTP(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self)


class _PublicHTTPS(http.client.HTTPSConnection):
    def connect(self) -> None:
        self.sock = self._context.wrap_socket(_connect(self), server_hostname=self.host)  # type: ignore[attr-defined]


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_PublicHTTP, req)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_PublicHTTPS, req)
