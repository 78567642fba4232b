"""One HTTP request whose answer begins within a bounded time, whatever the other side sends.

The timeout of Python's urlopen is for each wait alone. A server that sends a letter of its headers now and then, or
endless notices that the answer will come, would keep the caller for ever. Here a watch over the whole shuts the
connection, and no thread is left behind.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PATIENCE = 10  # times the timeout of a single wait, redirections included


def open_answer(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    """The response, once its headers are here; its body is still to be read, with `timeout` seconds for each wait.

    Raises TimeoutError after `PATIENCE` times that, and what urlopen raises.
    """
    watch = _Watch()
    timer = threading.Timer(PATIENCE * timeout, watch.ring)
    timer.daemon = True
    timer.start()
    opener = urllib.request.build_opener(_Http(watch), _Https(watch))
    late = TimeoutError(f"no answer within {PATIENCE * timeout:g} s")
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
    except (OSError, http.client.HTTPException) as error:
        raise late if watch.rang else error from None
    finally:
        timer.cancel()
    if watch.rang:  # headers that were cut off look complete
        response.close()
        raise late
    return response


class _Watch:
    """Knows the connections that are open, and shuts them when it rings."""

    def __init__(self) -> None:
        self.rang = False
        self._connections: list[http.client.HTTPConnection] = []

    def add(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        if self.rang:
            raise TimeoutError
        self._connections.append(connection)
        return connection

    def ring(self) -> None:
        self.rang = True
        for connection in self._connections:
            with suppress(OSError, AttributeError):  # its socket may be gone already
                connection.sock.shutdown(socket.SHUT_RDWR)


class _Watched(urllib.request.AbstractHTTPHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def do_open(self, http_class: Callable[..., Any], req: Any, **settings: Any) -> Any:
        return super().do_open(lambda *a, **more: self._watch.add(http_class(*a, **more)), req, **settings)


class _Http(_Watched, urllib.request.HTTPHandler):
    pass


class _Https(_Watched, urllib.request.HTTPSHandler):
    pass
