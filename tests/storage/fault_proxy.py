"""An HTTP proxy in front of the S3 server of the tests, which does what stores and networks do to requests.

What happens to a request depends on the seed, on what it asks for, and on how often that was asked
before; not on the order in which threads come.  Conditional puts go through one at a time: S3 decides them
atomically, moto looks first and writes then.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

# reset: in the middle of the request.  lost, closed: it is done, and then the connection is reset, or closed.
# silent: it is done, and no answer comes.  cut: half of the answer comes.
KINDS: Final = ("503", "500", "429", "409", "reset", "cut", "lost", "closed", "silent", "slow-list")
_ERRORS: Final = {
    "503": (503, "SlowDown"),
    "500": (500, "InternalError"),
    "429": (429, "TooManyRequests"),
    "409": (409, "ConditionalRequestConflict"),
    "gone": (404, "NoSuchUpload"),
}
_RANDOM_NAMES: Final = re.compile(r"(?i)(uploadId=[^&]*|[0-9a-f]{24}|continuation-token=[^&]*)")


@dataclass
class Schedule:
    """Which faults happen.

    Attributes:
        chances: how likely each kind is, for each request by itself.
        storm: requests of these numbers all get 503.
        down_from: from this request on all get 503, for ever.
    """

    seed: int = 0
    chances: dict[str, float] = field(default_factory=dict)
    storm: range = range(0)
    down_from: int | None = None
    slow_s: float = 0.05
    silent_s: float = 30.0  # or until the client gives up
    no_conditional_put: str = ""  # "refuse": 501; "ignore": the header is dropped

    @classmethod
    def of(cls, seed: int) -> Schedule:
        """Some kinds of faults, rarely or often; every fifth schedule has a store that goes away for good."""
        rng = random.Random(seed)
        kinds = rng.sample(KINDS, rng.randint(1, 4))
        chances = {kind: rng.uniform(0.02, 0.3) for kind in kinds}
        if "silent" in chances:
            chances["silent"] = min(chances["silent"], 0.02)  # each costs a deadline
        begin = rng.randint(0, 40)
        storm = range(begin, begin + rng.randint(0, 8))
        down = rng.randint(1, 45) if seed % 5 == 4 else None
        return cls(seed, chances, storm, down)

    def fault(self, number: int, what: str, before: int) -> str:
        """The fault of request `number`, which asks `what` and was asked so often before; "" for none."""
        if number in self.storm or (self.down_from is not None and number >= self.down_from):
            return "503"
        rng = random.Random(f"{self.seed} {what} {before}")
        return next((kind for kind, chance in self.chances.items() if rng.random() < chance), "")


class FaultProxy:
    """Listens on loopback; `schedule` may be exchanged between runs."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._conditional = threading.Lock()
        self._lock = threading.Lock()
        self.use(Schedule())
        proxy = self

        class Bound(_Handler):
            pass

        Bound.proxy = proxy
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def use(self, schedule: Schedule) -> None:
        with self._lock:
            self.schedule = schedule
            self._number = 0
            self._seen: Counter[str] = Counter()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def decide(self, method: str, path: str) -> tuple[Schedule, str]:
        """The schedule in use, and the fault of this request; "" for none."""
        with self._lock:
            what = f"{method} {_RANDOM_NAMES.sub('', path)}"
            number, before = self._number, self._seen[what]
            self._number += 1
            self._seen[what] += 1
            self.requests[method] += 1
            fault = self.schedule.fault(number, what, before)
            if (fault == "slow-list" and "list-type" not in path) or (fault == "409" and method != "PUT"):
                fault = ""
            if fault:
                self.injected[fault] += 1
            return self.schedule, fault

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        with self._one_at_a_time("if-none-match" in {name.lower() for name in headers}):
            connection = http.client.HTTPConnection(*self.target, timeout=30)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

    @contextmanager
    def _one_at_a_time(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        with self._conditional:
            yield


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    timeout = 60

    def do_GET(self) -> None:
        with suppress(ConnectionError, TimeoutError, ValueError):  # the client went away
            self._serve()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        schedule, fault = self.proxy.decide(self.command, self.path)
        length = int(self.headers.get("content-length") or 0)
        if fault == "reset":  # in the middle of the request's body, if it has one
            self.rfile.read(length // 2)
            self._drop()
            return
        body = self.rfile.read(length)
        if fault in _ERRORS:
            self._error(*_ERRORS[fault])
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
        conditional = any(name.lower() == "if-none-match" for name in headers)
        if conditional and schedule.no_conditional_put == "refuse":
            self._error(501, "NotImplemented")
            return
        if conditional and schedule.no_conditional_put == "ignore":
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
        if fault == "slow-list":
            threading.Event().wait(schedule.slow_s)
        status, answered, data = self.proxy.forward(self.command, self.path, headers, body)
        if fault in ("lost", "closed"):
            self._drop(reset=fault == "lost")
        elif fault == "silent":
            self._wait(schedule.silent_s)
            self._drop()
        else:
            self._answer(status, answered, data, cut=fault == "cut")

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool) -> None:
        self.send_response_only(status)
        skipped = {"connection", "transfer-encoding"} | (
            set() if self.command == "HEAD" else {"content-length"}
        )
        for name, value in headers:
            if name.lower() not in skipped:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if cut:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._drop()
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the test</Message></Error>'
        data = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _wait(self, seconds: float) -> None:
        """Until the client gives up."""
        self.connection.settimeout(seconds)
        with suppress(OSError):
            self.connection.recv(1)

    def _drop(self, *, reset: bool = True) -> None:
        """Ends the connection now."""
        self.close_connection = True
        with suppress(OSError):
            if not reset:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            os.close(self.connection.detach())  # its files would keep it open
