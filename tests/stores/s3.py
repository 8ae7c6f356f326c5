"""An S3 server of its own on this machine (moto's, in an environment of its own), and a proxy before it that fails as stores do."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SERVER = Path(sys.prefix) / "moto" / "bin" / "moto_server"
"""Made by ``make test``."""
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BROKEN = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
FAULTS = ("slow down", "internal error", "reset before", "reset after", "cut short")


@contextlib.contextmanager
def server(log: Path) -> Iterator[str]:
    """A running server with an empty bucket ``bucket``; yields its address, host:port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with log.open("wb") as out:
        process = subprocess.Popen([str(SERVER), "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out, env={**os.environ, **keys})
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"), timeout=30)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on, and fails a share of them, drawn by a seed.

    Args:
        upstream: host:port.
        share: of the requests that fail.
        seed: of the draws.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, share: float, seed: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.share = upstream, share
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.count: Counter[str] = Counter()
        self.away_until = self.puts_held_until = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def draw(self) -> str | None:
        """Which fault the next request meets."""
        with self.lock:
            if time.monotonic() < self.away_until:
                self.count["away"] += 1
                return "slow down"
            fault = self.random.choice(FAULTS) if self.random.random() < self.share else None
            self.count[fault or "passed"] += 1
        return fault

    def handle_error(self, request: object, address: object) -> None:
        pass  # clients go, too


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        fault = self.server.draw()
        body = self.body()
        if self.command == "PUT":
            time.sleep(max(0.0, self.server.puts_held_until - time.monotonic()))
        if fault == "reset before":
            return self.reset()
        if fault in ("slow down", "internal error"):
            return self.answer(
                503 if fault == "slow down" else 500, {"Content-Type": "application/xml"}, SLOW_DOWN if fault == "slow down" else BROKEN
            )
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", "transfer-encoding", "content-length"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            told = connection.getresponse()
            data, headers = (
                told.read(),
                {name: value for name, value in told.headers.items() if name.lower() not in ("connection", "transfer-encoding")},
            )
        finally:
            connection.close()
        if fault == "reset after":
            return self.reset()
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        return self.answer(told.status, {**headers, "Content-Length": length}, data, cut=fault == "cut short")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

    def body(self) -> bytes:
        """What was sent, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def answer(self, code: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.reset()

    def reset(self) -> None:
        """The connection ends as when a machine on the way goes."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def faulty(upstream: str, share: float, seed: int) -> Iterator[Proxy]:
    """A running proxy."""
    with Proxy(upstream, share, seed) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()
