"""A folder of downloaded files that the processes of a machine share, bounded in bytes.

A file is named by its SHA-256, so that it is the same whoever asks for it. Whoever uses it holds a shared
lock on `<sha256>.use`: it stays. Whoever downloads it holds an exclusive one on `<sha256>.download`: others
wait. The kernel takes them back when a process dies. To make room, what was used longest ago goes first.
"""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data.download import Stopped, Unwritable, download

WHOLE, PART = ".npy", ".part"
USE, DOWNLOAD = ".use", ".download"
ROOM_TIMEOUT = 60.0  # seconds for others to let go of what they use
ROOM_PAUSE = 0.1


class CachedFile(NamedTuple):
    """Where a file comes from, what its digest is, and how many bytes it has."""

    address: str
    sha256: str
    size: int


class Cache:
    """Files below `folder`, of at most `most` bytes together, those being downloaded included."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder = folder
        self.most = most

    def path(self, file: CachedFile) -> Path:
        return self.folder / f"{file.sha256}{WHOLE}"

    def hold(self, file: CachedFile, stop: threading.Event, wait: bool = True) -> int | None:
        """Have a file here, downloaded if it is not, and in use until the descriptor is given to `release`.

        wait: for room, where all is in use; otherwise None then. Raises ValueError in one line where the file
        cannot be had or the disk is full, and Stopped once `stop` is set.
        """
        if file.size > self.most:
            raise ValueError(
                f"data.cache_bytes: {self.most:,} are too few for {file.address} of {file.size:,} bytes"
            )
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            use = self._lock(file.sha256 + USE, fcntl.LOCK_SH)
        try:
            if self.path(file).exists() or self._download(file, stop, wait):
                os.utime(self.path(file))
                return use
        except BaseException:
            os.close(use)
            raise
        os.close(use)
        return None

    def release(self, file: CachedFile, use: int) -> None:
        """Use a file no longer: it may now be removed."""
        with suppress(OSError):
            os.utime(self.path(file))  # when it was used last
        os.close(use)

    def _download(self, file: CachedFile, stop: threading.Event, wait: bool) -> bool:
        """Whether the file is here; in the end it is not where there is no room."""
        lock = self._lock(file.sha256 + DOWNLOAD, fcntl.LOCK_EX)
        try:
            return self.path(file).exists() or self._bring(file, stop, wait)
        finally:
            os.close(lock)

    def _bring(self, file: CachedFile, stop: threading.Event, wait: bool) -> bool:
        # The name says how much room is taken, of which another process reads the sum.
        part = self.folder / f"{file.sha256}.{file.size}{PART}"
        deadline = time.monotonic() + ROOM_TIMEOUT
        while not self._make_room(part, file.size):
            if not wait:
                return False
            if time.monotonic() > deadline:
                raise ValueError(
                    f"data.cache_bytes: {self.most:,} are too few, all files in {self.folder} are in use; "
                    f"{file.size:,} more are needed for {file.address}"
                )
            if stop.wait(ROOM_PAUSE):
                raise Stopped
        try:
            download(file.address, part, file.sha256, stop)
        except Unwritable as error:
            part.unlink(missing_ok=True)
            raise self._unwritable(str(error)) from None
        except ValueError as error:
            raise ValueError(f"{error}; what is in {self.folder} stays") from None
        with self._alone():  # who adds up the room sees it once
            part.rename(self.path(file))
        return True

    def _make_room(self, part: Path, size: int) -> bool:
        """Take `size` bytes for a file that is to be downloaded; False where too much is in use."""
        with self._writable(), self._alone():
            files = []
            for entry in os.scandir(self.folder):
                if entry.name.endswith((WHOLE, PART)) and entry.name != part.name:
                    with suppress(FileNotFoundError):  # a part that turned out wrong has just gone
                        files.append((entry.stat().st_mtime, _room(entry), entry.name))
            used = size + sum(room for _, room, _ in files)
            for _, room, name in sorted(files):
                if used <= self.most:
                    break
                used -= room if self._remove(name) else 0
            if used > self.most:
                return False
            part.touch()
            return True

    def _remove(self, name: str) -> bool:
        """Remove a file unless it is in use or being downloaded. One that is mapped somewhere stays readable
        there."""
        kind = USE if name.endswith(WHOLE) else DOWNLOAD
        try:
            lock = self._lock(name.partition(".")[0] + kind, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            (self.folder / name).unlink()
        finally:
            os.close(lock)
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = self._lock("room", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(lock)

    def _lock(self, name: str, kind: int) -> int:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, kind)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unwritable(os.strerror(error.errno or errno.EIO)) from None

    def _unwritable(self, reason: str) -> ValueError:
        return ValueError(
            f"data.cache: {self.folder}: {reason}; make room there, lower data.cache_bytes or name another "
            "disk; what is in it stays"
        )


def _room(entry: os.DirEntry[str]) -> int:
    if entry.name.endswith(PART):
        return int(entry.name.split(".")[1])
    return entry.stat().st_size
