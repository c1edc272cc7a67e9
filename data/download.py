"""One file from an address to the disk, whatever the line and the server do."""

import hashlib
import http.client
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from data.cli import one_line

TRIES = 5  # in a row that bring nothing
PAUSE = 0.5  # seconds before the second try, twice as long before each further one
TIMEOUT = 10.0  # seconds
LEAST = 2**16  # bytes that must come within TIMEOUT
LATER = frozenset({408, 425, 429})  # of the statuses 4xx those that another try may change
PROGRESS = 2**20  # bytes by which a try has brought something
BLOCK = 2**18
NEVER = threading.Event()


class Unwritable(Exception):
    """The disk does not take what was downloaded; a further try would not help."""


class Stopped(Exception):
    """The event that a download looks at was set."""


class Remote(NamedTuple):
    """A file being read. start: its byte that comes first. stop: its size, where the server says so."""

    read: Callable[[int], bytes]
    start: int
    stop: int | None


def download(address: str, path: Path, sha256: str | None = None, stop: threading.Event = NEVER) -> None:
    """Bring what lies at an address to `path`, going on behind the bytes that are there already.

    sha256: what its digest must be. What is cut off, slower than LEAST in TIMEOUT or wrong is tried again,
    TRIES times in a row. Raises ValueError in one line with the address when that does not help or cannot
    help, and the bytes that came stay; Unwritable; Stopped once `stop` is set.
    """
    source = _source(address)
    tries = 0
    while True:
        before = _size(path)
        try:
            _receive(source, path, stop)
            if sha256 is None or _digest(path) == sha256:
                return
            path.unlink()
            wrong = "its SHA-256 is not that of the manifest"
        except (Unwritable, Stopped):
            raise
        except Exception as error:  # file systems fail in many classes of their own
            wrong = _reason(error)
            if _final(error):
                line = f"data.address: {address}: {wrong}; name a prepared folder that has it"
                raise ValueError(line) from None
            if _size(path) - before >= PROGRESS:
                tries = 0
        tries += 1
        if tries == TRIES:
            raise ValueError(
                f"data.address: {address}: {wrong} ({TRIES} tries in a row); start again when it can be read"
            )
        if stop.wait(PAUSE * 2 ** (tries - 1) * random.uniform(0.5, 1.5)):  # ranks do not come back at once
            raise Stopped


def not_now(status: int) -> bool:
    """Whether a server that answers with an HTTP status may answer otherwise later."""
    return status >= 500 or status in LATER


def _final(error: Exception) -> bool:
    """Whether another try would end in the same error."""
    if isinstance(error, HTTPError):
        return not not_now(error.code)
    return isinstance(error, FileNotFoundError | PermissionError | http.client.InvalidURL)


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
    return getattr(cause, "strerror", None) or one_line(cause)


def _source(address: str) -> Callable[[int], AbstractContextManager[Remote]]:
    """Opens the file at an address, to be read from a byte on."""
    # fsspec's own HTTP needs one more package, goes on waiting for a server that hangs, and takes a server
    # without ranges for one with.
    if urlsplit(address).scheme in ("http", "https"):
        return lambda offset: _http(address, offset)
    from fsspec.core import url_to_fs  # only who needs it pays

    try:
        file_system, path = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(f"data.address: {address}: {one_line(error)}") from None

    @contextmanager
    def opened(offset: int) -> Iterator[Remote]:
        with file_system.open(path, "rb") as file:
            file.seek(offset)
            yield Remote(file.read, offset, None)

    return opened


@contextmanager
def _http(address: str, offset: int) -> Iterator[Remote]:
    request = Request(address, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # all of it is there; its digest tells
            yield Remote(lambda _: b"", offset, None)
            return
        raise
    with response:
        start = offset if response.status == http.client.PARTIAL_CONTENT else 0
        length = response.headers["Content-Length"]
        yield Remote(response.read1, start, None if length is None else start + int(length))


def _receive(
    source: Callable[[int], AbstractContextManager[Remote]], path: Path, stop: threading.Event
) -> None:
    """Bring what is missing of a file. Raises what the source raises, and OSError where it is cut off."""
    with _disk():
        file = path.open("ab", buffering=0)  # what a full disk refuses then shows at once
    with file, source(_size(path)) as remote:
        with _disk():
            file.truncate(remote.start)
        position = remote.start
        due, needed = time.monotonic() + TIMEOUT, position + LEAST
        while block := remote.read(BLOCK):
            with _disk():
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
            position += len(block)
            if stop.is_set():
                raise Stopped
            if time.monotonic() > due:
                if position < needed:
                    raise TimeoutError(f"fewer than {LEAST:,} bytes in {TIMEOUT:.0f} s")
                due, needed = time.monotonic() + TIMEOUT, position + LEAST
        if remote.stop is not None and position != remote.stop:
            raise OSError(f"cut off after {position:,} of {remote.stop:,} bytes")
        with _disk():
            os.fsync(file.fileno())


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(error.strerror) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
