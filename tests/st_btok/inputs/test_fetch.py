"""Fetching against a server of our own: only when asked for, only public addresses, bounded."""

from __future__ import annotations

import base64
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from st_btok.inputs import fetch as fetch_module
from st_btok.inputs.fetch import fetch, open_source


@pytest.fixture
def server():
    """Its address; `asked` lists the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
            else:
                self.send_response(200 if self.path == "/a" else 404)
            self.end_headers()
            self.wfile.write(b"content" if self.path == "/a" else b"")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    server.asked = asked
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def local_is_public(monkeypatch):
    is_public = fetch_module._is_public
    monkeypatch.setattr(fetch_module, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))


def test_urls_are_fetched_only_when_asked_for(server, local_is_public):
    with pytest.raises(ValueError, match="is not fetched. Download it first, or pass allow_urls=True"):
        open_source(f"{server.url}/a")
    assert not server.asked
    assert open_source(f"{server.url}/a", allow_urls=True).file.read() == b"content" and server.asked == ["/a"]
    with pytest.raises(ValueError, match="can't be fetched: .*404"):
        fetch(f"{server.url}/b")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "0.0.0.0",
     "[::ffff:127.0.0.1]", "[fe80::1]", "100.64.0.1", "224.0.0.1", "[64:ff9b::7f00:1]", "[64:ff9b:1::a00:1]",
     "[::7f00:1]", "[2002:7f00:1::]", "[fec0::1]"],
)  # fmt: skip
def test_private_addresses_are_refused_after_resolution(server, host):
    with pytest.raises(ValueError, match=r"can't be fetched: .*(private address|[Nn]ame|family|resolution)"):
        fetch(f"http://{host}:{server.server_port}/a")
    assert not server.asked


def test_a_name_is_resolved_once(server, monkeypatch):
    """A name that is public when it is looked at and private when it is connected to."""
    answers = iter(["8.8.8.8", "127.0.0.1"])

    def resolve(host, port, *args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    reached = []

    def connect(address, timeout):
        reached.append(address[0])
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match="no network here"):
        fetch("http://rebinding.example/a")
    assert reached == ["8.8.8.8"]


def test_redirects_lead_nowhere_else(server, local_is_public):
    assert fetch(f"{server.url}/to/{server.url}/a") == b"content"
    for target in ("http://10.0.0.1/a", "file:///etc/passwd", "ftp://127.0.0.1/a"):
        with pytest.raises(ValueError, match="can't be fetched"):
            fetch(f"{server.url}/to/{target}")


def test_size_and_time_are_bounded(server, local_is_public, monkeypatch):
    monkeypatch.setattr(fetch_module, "_FETCH_BYTES", 3)
    with pytest.raises(ValueError, match="holds more than 3 bytes"):
        fetch(f"{server.url}/a")
    monkeypatch.setattr(fetch_module, "_FETCH_BYTES", 100)
    clock = iter([0.0, 31.0, 62.0])
    monkeypatch.setattr(fetch_module.time, "monotonic", lambda: next(clock))
    with pytest.raises(ValueError, match="takes more than 30 s"):
        fetch(f"{server.url}/a")


def test_a_long_row_of_blanks_is_no_base64_and_costs_next_to_nothing(monkeypatch):
    """The pattern had two ways to take a blank, so a text of 16,000 cost 1.7 s: steps grew with the square."""
    for text in (" " * 100_000 + "!", "A" * 100_000 + " " * 100_000 + "!", "A" * 64 + ("=" + " " * 50_000) * 2 + "!"):
        with pytest.raises(ValueError, match="does not exist"):
            open_source(text)
    encoded = base64.b64encode(bytes(range(64))).decode()
    for text in (encoded, encoded + " \n ", encoded[:-1] + "= \n", encoded.replace("B", "\nB")):
        try:
            assert open_source(text).file.read()[:3] == bytes(range(3))
        except ValueError as error:
            pytest.fail(f"{text!r}: {error}")
