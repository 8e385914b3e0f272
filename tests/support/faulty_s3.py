"""A proxy in front of a real S3 server that does to requests what networks and servers do on a bad day."""

from __future__ import annotations

import http.client
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Gone(Exception):  # noqa: N818
    """The client's connection is closed without (the rest of) an answer."""


@dataclass
class Exchange:
    """One request, and the means to answer it, well or badly."""

    handler: Handler
    body: bytes

    def forward(self, body: bytes | None = None) -> tuple[int, list[tuple[str, str]], bytes]:
        """The real server's answer to the request, or to one with another body of the same length."""
        connection = self._connect()
        connection.endheaders(self.body if body is None else body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content

    def forward_part(self, size: int) -> None:
        """Only the body's first bytes reach the real server, then the connection breaks."""
        connection = self._connect()
        connection.endheaders(self.body[:size])
        connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        """Answer, or half of it."""
        self.handler.send_response_only(status)
        skipped = {"transfer-encoding", "connection"} | (set() if self.is_head else {"content-length"})
        for name, value in headers:
            if name.lower() not in skipped:
                self.handler.send_header(name, value)
        if not self.is_head:
            self.handler.send_header("Content-Length", str(len(content)))
        self.handler.end_headers()
        if cut:
            self.handler.wfile.write(content[: len(content) // 2])
            raise Gone
        self.handler.wfile.write(b"" if self.is_head else content)

    @property
    def is_head(self) -> bool:
        return self.handler.command == "HEAD"

    @property
    def is_abandoned(self) -> bool:
        """Whether the client has closed its end."""
        connection = self.handler.connection
        if not select.select([connection], [], [], 0)[0]:
            return False
        try:
            return not connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.handler.server.upstream, timeout=30)
        connection.putrequest(self.handler.command, self.handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.handler.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        return connection


Fault = Callable[[Exchange], None]


def error(status: int, code: str) -> Fault:
    """An answer in S3's words."""

    def fault(exchange: Exchange) -> None:
        content = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        exchange.answer(status, [("Content-Type", "application/xml")], content)

    return fault


def hang_up(_: Exchange) -> None:
    """The connection is closed once the request is read."""
    raise Gone


def reset(exchange: Exchange) -> None:
    """The connection is reset."""
    exchange.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise Gone


def cut_upload(exchange: Exchange) -> None:
    """Half of the body reaches the server, then both connections break."""
    exchange.forward_part(len(exchange.body) // 2)
    raise Gone


def cut_answer(exchange: Exchange) -> None:
    """Half of the answer's body reaches the client."""
    exchange.answer(*exchange.forward(), cut=True)


def lose_answer(exchange: Exchange) -> None:
    """The server does what it is asked to, but the client doesn't hear of it."""
    exchange.forward()
    raise Gone


def flip_a_bit(exchange: Exchange) -> None:
    """The body reaches the server changed."""
    body = bytearray(exchange.body)
    body[len(body) // 2] ^= 1
    exchange.answer(*exchange.forward(bytes(body)))


def delay(seconds: float) -> Fault:
    """The server takes its time."""

    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)
        exchange.answer(*exchange.forward())

    return fault


def refuse_key(access_key: str) -> Fault:
    """Requests signed with this key are refused, as after its end."""

    def fault(exchange: Exchange) -> None:
        if access_key in exchange.handler.headers.get("Authorization", ""):
            error(403, "InvalidAccessKeyId")(exchange)
        else:
            exchange.answer(*exchange.forward())

    return fault


@dataclass
class Rule:
    """A fault for some requests."""

    fault: Fault
    pattern: re.Pattern[str]
    times: float
    hits: int = 0

    def takes(self, request: str) -> bool:
        if self.hits >= self.times or not self.pattern.search(request):
            return False
        self.hits += 1
        return True


class FaultyS3(ThreadingHTTPServer):
    """The proxy. `requests` are those that were made, as `METHOD /bucket/key?query`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str, host: str) -> None:
        super().__init__((host, 0), Handler)
        self.upstream = urlsplit(upstream).netloc
        self.endpoint = f"http://{host}:{self.server_port}"
        self.requests: list[str] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()

    def inject(self, fault: Fault, matching: str = "", *, times: float = float("inf")) -> Rule:
        """Let requests that match a pattern fail, so many times."""
        rule = Rule(fault, re.compile(matching), times)
        with self._lock:
            self._rules.append(rule)
        return rule

    @contextmanager
    def holding(self, matching: str) -> Iterator[threading.Event]:
        """Requests that match wait until the block ends. The event tells that the first one is there.

        Those of clients that have gone meanwhile don't reach the real server any more.
        """
        arrived, released = threading.Event(), threading.Event()

        def hold(exchange: Exchange) -> None:
            arrived.set()
            released.wait()
            if exchange.is_abandoned:
                raise Gone
            exchange.answer(*exchange.forward())

        rule = self.inject(hold, matching)
        try:
            yield arrived
        finally:
            rule.times = 0
            released.set()

    def heal(self) -> None:
        """Be good from now on."""
        with self._lock:
            self._rules.clear()

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            return next((rule.fault for rule in self._rules if rule.takes(request)), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: FaultyS3
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        exchange = Exchange(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        fault = self.server.fault_for(f"{self.command} {self.path}")
        try:
            if fault is None:
                exchange.answer(*exchange.forward())
            else:
                fault(exchange)
        except Gone:
            self.close_connection = True

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def in_front_of(endpoint: str, *, host: str = "127.0.0.1") -> Iterator[FaultyS3]:
    """A running proxy, at an address of this machine."""
    proxy = FaultyS3(endpoint, host)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
