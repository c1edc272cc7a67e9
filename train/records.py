"""metrics.jsonl: one JSON record a line, whole lines only, none after the step that a run goes on from."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """Every record of a metrics.jsonl. A line that a killed run left half-written is passed over."""
    content = path.read_bytes() if path.exists() else b""
    return [record for _, record in _parse(content) if record]


class Records:
    """The records of one run, in a file and, while that cannot be written, in memory.

    After the constructor no error of the disk is raised: lines wait in memory and are tried again with each
    further one.

    Args:
        start: the step that the run goes on from; what lies after it is dropped (everything, at 0).
        say: shows a line to the person at the terminal.

    Raises:
        ValueError: the file cannot be opened.
    """

    def __init__(self, path: Path, start: int, say: Callable[[str], None]) -> None:
        self._name, self._say = path.name, say
        self._failed = False  # the file may have a torn end, and this was said
        self._waiting: deque[bytes] = deque()
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  open for the life of the run
            self._end = os.fstat(self._file.fileno()).st_size  # bytes of the whole lines in the file
            self.rewind(start or -1)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be written ({error.strerror}); restore it, or choose another directory=…"
            ) from None

    def append(self, record: Record) -> None:
        """One more record. It needs "kind" and "step", and numbers that are finite."""
        self._known.add((record["kind"], record["step"]))
        self._waiting.append(json.dumps(record).encode() + b"\n")
        self._push()

    def has(self, kind: str, step: int) -> bool:
        """Whether there is a record of this kind at this step."""
        return (kind, step) in self._known

    def read(self) -> list[Record]:
        """All records, those in memory too."""
        return [record for _, record in _parse(self._content()) if record]

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, and lines that are none.

        The file is cut before the first of them. If there are others to keep behind it, they are written
        again; as a rule there are none, and then this needs no space on the disk.
        """
        on_file, content = self._end, self._content()
        offset, self._end, self._waiting, self._known = 0, 0, deque(), set()
        for line, record in _parse(content):
            if record and record["step"] <= step:
                self._known.add((record["kind"], record["step"]))
                if offset == self._end and offset + len(line) <= on_file and line.endswith(b"\n"):
                    self._end += len(line)
                else:
                    self._waiting.append(line.rstrip(b"\n") + b"\n")
            offset += len(line)
        self._push(cut=True)

    def sync(self) -> None:
        """Have everything so far on the disk, as far as it takes it."""
        self._push(sync=True)

    def close(self) -> None:
        """A last attempt to write what waits, and the end of the file."""
        self._push()
        if self._waiting:
            self._say(f"{self._name}: {_count(self._waiting)} could not be written, lost")
        with suppress(OSError):
            self._file.close()

    def _content(self) -> bytes:
        self._file.seek(0)
        return self._file.readall()[: self._end] + b"".join(self._waiting)

    def _push(self, cut: bool = False, sync: bool = False) -> None:
        """Write what waits. cut: the file is longer than its whole lines; sync: force it to the disk."""
        number, waiting = self._file.fileno(), _count(self._waiting)
        try:
            if cut or self._failed:
                os.ftruncate(number, self._end)
            while self._waiting:
                line = self._waiting[0]
                while line:
                    line = line[os.write(number, line) :]
                self._end += len(self._waiting.popleft())
            if sync:
                os.fsync(number)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(number, self._end)
            if not self._failed:
                kept = _count(self._waiting)
                self._say(f"{self._name} cannot be written ({error.strerror}): keeping {kept} in memory")
            self._failed = True
            return
        if self._failed:
            self._say(f"{self._name} can be written again: {waiting} made up for")
        self._failed = False


def _count(lines: Sized) -> str:
    return f"{len(lines)} line{'' if len(lines) == 1 else 's'}"


def _parse(content: bytes) -> Iterator[tuple[bytes, Record | None]]:
    """Each line of a file's content, with its record: None where it is none."""
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            yield line, record if {"kind", "step"} <= record.keys() else None
        except (ValueError, AttributeError):
            yield line, None
