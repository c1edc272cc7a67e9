"""A loopback HTTP server of a folder with faults, which counts what it is asked for and what it sends."""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAUSE = 0.05  # seconds between what a slow answer sends


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer. status: instead of 200. cut: bytes after which the connection ends.
    flip: place of a byte of the answer that is sent wrong. rate: bytes a second. hang: nothing comes, until
    the server closes."""

    status: int | None = None
    cut: int | None = None
    flip: int | None = None
    rate: float | None = None
    hang: bool = False


class Server:
    """faults: by file name, those of its next requests, in order; always: of all that come after those.
    ranges: whether parts of files can be asked for. requests, sent: by file name, how many and bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.changed = threading.Condition()  # of requests and sent
        self.closed = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def next_fault(self, name: str) -> Fault:
        with self.changed:
            self.requests[name] += 1
            self.changed.notify_all()
            return self.faults[name].pop(0) if self.faults[name] else self.always.get(name, Fault())


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the files below a folder, at server.address."""
    server = Server(folder)
    thread = threading.Thread(target=server._http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closed.set()
        server._http.shutdown()
        thread.join()
        server._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: Server

    def do_GET(self) -> None:
        path = self.owner.folder / self.path.lstrip("/")
        fault = self.owner.next_fault(path.name)
        with suppress(ConnectionError):  # the other side has had enough
            if fault.hang:
                self.owner.closed.wait()
            elif fault.status or not path.is_file():
                self.send_error(fault.status or 404)
            else:
                self._send(path, fault)

    def _send(self, path: Path, fault: Fault) -> None:
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.owner.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        body = bytearray(content[start:])
        if fault.flip is not None:
            body[fault.flip] ^= 0xFF
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: fault.cut]
        size = max(1, int(fault.rate * PAUSE)) if fault.rate else len(body) or 1
        for place in range(0, len(body), size):
            block = body[place : place + size]
            self.wfile.write(block)
            with self.owner.changed:
                self.owner.sent[path.name] += len(block)
                self.owner.changed.notify_all()
            if fault.rate and self.owner.closed.wait(len(block) / fault.rate):
                return

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""
