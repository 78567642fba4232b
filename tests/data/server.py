"""A web server on this machine that serves the fake archive, and misbehaves in every way a real one does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from src.data.download import Patience
from tests.data.fake_archive import PAYLOAD

QUICK = Patience(timeout=0.4, rounds=2, pause=0.0, window=0.2, slow=1e6, stalled=1.0)


@dataclass
class Host:
    """Where the server is, and what it was asked for: the way, and the Range header."""

    address: str
    cut_at: int = 0
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def url(self, way: str) -> str:
        return f"{self.address}/{way}/fake.tar.gz"


@contextmanager
def serving() -> Iterator[Host]:
    """Serves PAYLOAD while the block runs. The first part of a path says in which way; "cut-at" cuts at `cut_at`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def send(self, status: int, body: bytes, kind: str = "application/x-gzip", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            for key, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            way, asked = self.path.split("/")[1], self.headers.get("Range")
            here.seen.append((way, asked))
            first = int(asked.split("=")[1].rstrip("-")) if asked else 0
            rest, total = PAYLOAD[first:], len(PAYLOAD)
            span = {"Content_Range": f"bytes {first}-{total - 1}/{total}"}
            try:
                if way == "html":
                    self.send(200, b"<html>please log in</html>", "text/html; charset=utf-8")
                elif way == "to-html":
                    self.send(302, b"", Location=here.url("html"))
                elif way == "in-circles":
                    self.send(302, b"", Location=here.url("in-circles"))
                elif way == "disguised":
                    self.send(200, b"<html>" + b" " * (total - 6))
                elif way == "wrong":
                    self.send(200, PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]))
                elif way == "other-size":
                    self.send(200, PAYLOAD[:100])
                elif way == "endless":
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(PAYLOAD + b"more" * 100_000)
                elif way == "silent":
                    time.sleep(1.0)
                elif way == "stalled":  # all but the end, and then nothing, with the connection left open
                    part = rest[: here.cut_at]
                    self.send(206 if asked else 200, part, Content_Length=str(len(rest)), **(span if asked else {}))
                    time.sleep(1.0)
                elif way == "slow":
                    self.send(206 if asked else 200, rest[:0], Content_Length=str(len(rest)), **(span if asked else {}))
                    for start in range(0, len(rest), 1000):
                        self.wfile.write(rest[start : start + 1000])
                        time.sleep(0.05)
                elif way == "steady":  # in half a second
                    self.send(206 if asked else 200, rest[:0], Content_Length=str(len(rest)), **(span if asked else {}))
                    for start in range(0, len(rest), total // 20):
                        self.wfile.write(rest[start : start + total // 20])
                        time.sleep(0.025)
                elif way == "cut":  # every answer is 40 % of the file
                    part = rest[: int(0.4 * total)]
                    self.send(206 if asked else 200, part, Content_Length=str(len(rest)), **(span if asked else {}))
                elif way == "cut-once" and not asked:
                    self.send(200, PAYLOAD[: total // 2], Content_Length=str(total))
                elif way == "cut-at" and not asked:
                    self.send(200, PAYLOAD[: here.cut_at], Content_Length=str(total))
                elif way == "no-range":
                    self.send(200, PAYLOAD)
                elif way == "shifted":
                    self.send(206, PAYLOAD[10:], Content_Range=f"bytes 10-{total - 1}/{total}")
                elif way == "416" and asked:
                    self.send(416, b"")
                elif way == "404":
                    self.send(404, b"")
                elif asked:
                    self.send(206, rest, **span)
                else:
                    self.send(200, PAYLOAD)
            except OSError:
                pass  # the client hung up, as it should in some of these

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Host(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
