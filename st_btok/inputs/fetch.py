"""Where a medium comes from: a path, bytes, base64 or a URL becomes a path or a stream. Nothing is decoded here.

URLs are fetched only when asked for, and only from public addresses: a name is resolved once, every address of it must
be public, and the connection goes to the address that was looked at, so neither a redirect nor a name that resolves
differently the second time reaches a machine behind the firewall.
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
from pathlib import Path
from typing import Any

_FETCH_SECONDS, _FETCH_BYTES, _PIECE = 30, 2**28, 2**16
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def is_url(source: Any) -> bool:
    """Whether a source would have to be fetched from the network.

    Args:
        source: Anything.

    Returns:
        True for text that starts with `http://` or `https://`.
    """
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def source_name(source: Any) -> str:
    """How an error calls a source.

    Args:
        source: Anything.

    Returns:
        The path or URL, or the type.
    """
    if isinstance(source, str | Path):
        return f"the file {str(source)[:200]!r}"
    return f"the {type(source).__name__}"


def read_source(source: Any, allow_urls: bool = False) -> Any:
    """Turn a path, URL, data URI or base64 into what opens as a file; everything else is returned as it is.

    Args:
        source: Path, URL, data URI, base64 or bytes.
        allow_urls: Fetch URLs (30 s in all, at most 256 MiB, public addresses only).

    Returns:
        A path that exists, a binary stream, or the source itself.

    Raises:
        ValueError: If there is no such file, or a URL may not be fetched or can't be.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if is_url(source):
        if not allow_urls:
            raise ValueError(f"the URL {source!r} is not fetched. Download it first, or pass allow_urls=True")
        return io.BytesIO(fetch(source))
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"the data URI {source[:40]!r}... is not base64. Pass a path or bytes") from error
    if isinstance(source, str | Path):
        return _existing(source)
    return source


def _existing(source: str | Path) -> Any:
    """A path to a file; or the content, where a string without such a file is base64, as `encode` reads it."""
    path = Path(source)
    try:
        if path.is_file():
            return path
        is_folder = path.is_dir()
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

    Args:
        url: `http://` or `https://`.

    Returns:
        The content.

    Raises:
        ValueError: If an address is private, or the answer fails, takes longer than 30 s or exceeds 256 MiB.
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
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return (mapped or found).is_global and not found.is_multicast


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
