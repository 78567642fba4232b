"""A web server on this machine that serves the fake archive, and misbehaves as real ones do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.data.fake_archive import PAYLOAD

TOTAL = len(PAYLOAD)
PAGE = b"<html>please log in</html>"


@dataclass
class Host:
    """Where the server is, and what it was asked for: the way to answer, and the first byte."""

    address: str
    seen: list[tuple[str, int]] = field(default_factory=list)

    def url(self, way: str) -> str:
        return f"{self.address}/{way}/cifar.tar.gz"


def answer(way: str, first: int) -> tuple[int, bytes, int]:
    """Status, body and Content-Length for a request of the bytes from `first` on."""
    rest = PAYLOAD[first:]
    answers = {
        "cut": (206, rest[: int(0.4 * TOTAL)], len(rest)),
        "wrong": (206, rest[:-1] + bytes([rest[-1] ^ 1]), len(rest)),
        "no-range": (200, PAYLOAD, TOTAL),
        "page": (200, PAGE, len(PAGE)),
        "404": (404, b"", 0),
    }
    return answers.get(way, (206, rest, len(rest)))


@contextmanager
def serving() -> Iterator[Host]:
    """Serve PAYLOAD while the block runs. The first part of a path says in which way."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            way, first = self.path.split("/")[1], int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            here.seen.append((way, first))
            status, body, length = answer(way, first)
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Host(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield here
    server.shutdown()
    server.server_close()
