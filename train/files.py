"""Files that survive a power cut: flushed to disk before they get their name, and known by their checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 2**22  # bytes read at a time


@dataclass(frozen=True)
class Entry:
    """What a manifest knows of a file."""

    bytes: int
    sha256: str


class _Hashing:
    """A file open for writing that adds up what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.failure = error
            raise
        self._digest.update(view)
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> Entry:
        return Entry(self._bytes, self._digest.hexdigest())


def write_hashed(path: Path, fill: Callable[[Any], Any]) -> Entry:
    """Make a file of what fill(file) writes, on disk when this returns. Raises OSError."""
    with open(path, "wb") as file:
        hashing = _Hashing(file)
        try:
            fill(hashing)
        except RuntimeError:  # torch.save's own, over the reason that its file gave
            raise hashing.failure or OSError("could not be written") from None
        file.flush()
        os.fsync(file.fileno())
    return hashing.entry()


def entry_of(path: Path, passed: Callable[[int], None] = lambda count: None) -> Entry:
    """The entry of a file as it is; passed: is told how many bytes were read at a time. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
            passed(len(block))
    return Entry(size, digest.hexdigest())
