"""A proxy on loopback in front of an MLflow server: it can be slow, and can ask for a user and a password."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import threading
import time
import urllib.parse
from collections.abc import Iterator


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on.

    Attributes:
        delay: Seconds that each request waits first.
        user: "name:password" that requests must bring, or None.
        refused: How many did not.
        served: How many were handed on.
    """

    daemon_threads = True

    def __init__(self, target: str, delay: float = 0.0, user: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urllib.parse.urlsplit(target).netloc
        self.delay, self.user, self.refused, self.served = delay, user, 0, 0

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is none of ours."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _hand_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.server.delay)
        if self.server.user is not None:
            wanted = "Basic " + base64.b64encode(self.server.user.encode()).decode()
            if self.headers.get("Authorization") != wanted:
                self.server.refused += 1
                return self._answer(401, {}, b"who are you?")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "authorization", "connection")}
        asked = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            asked.request(self.command, self.path, body, headers)
            answer = asked.getresponse()
            content = answer.read()
        except OSError:
            return self._answer(502, {}, b"the server is away")
        finally:
            asked.close()
        self.server.served += 1
        self._answer(answer.status, dict(answer.getheaders()), content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _hand_on  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def proxy(target: str, delay: float = 0.0, user: str | None = None) -> Iterator[Proxy]:
    """A running proxy."""
    with Proxy(target, delay, user) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
