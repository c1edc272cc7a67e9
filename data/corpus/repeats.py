"""What occurs more than once in a corpus: every text, or part of one, leaves a mark, and equal marks meet.

Marks are numbers of 64 bits: a text is taken for one of n others with a probability of n / 2**64. They are
written and read in sorted runs, so that memory does not grow with the corpus, only with the number of
occurrences of the most frequent text (20 bytes each).
"""

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

RUN = 2**19  # marks that are sorted at once
CHUNK = 2**12
MARK = np.dtype([("hash", "<u8"), ("task", "<u4"), ("document", "<u4"), ("unit", "<u4")])
Units = list[tuple[int, int]]  # (number of a part of a text, its hash)


class Mark(PipelineStep):
    """Writes the marks of the documents of a task, and passes them on. units: of a text."""

    type, name = "repeats", "mark"

    def __init__(self, folder: str, units: Callable[[str], Units]) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.units = units

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        marks = array("Q")  # hash, number of the document, unit, and so on
        runs = 0
        for number, document in enumerate(data):
            with self.track_time():
                for unit, hash in self.units(document.text):
                    marks.extend((hash, number, unit))
                while len(marks) >= 3 * RUN:
                    self._write(marks[: 3 * RUN], rank, runs)
                    del marks[: 3 * RUN]
                    runs += 1
            yield document
        with self.track_time():
            self._write(marks, rank, runs)

    def _write(self, marks: "array[int]", rank: int, run: int) -> None:
        columns = np.frombuffer(marks, np.uint64).reshape(-1, 3)
        records = np.zeros(len(columns), MARK)
        records["task"] = rank
        for column, name in enumerate(("hash", "document", "unit")):
            records[name] = columns[:, column]
        np.save(self.folder / f"{rank:05d}-{run:05d}.npy", _ordered(records, "hash", "document", "unit"))


class Find(PipelineStep):
    """Finds what occurs in at least `documents` documents and lists all of it but the first `kept`.

    Each task looks at a part of the range of marks. Runs on its own, after all marks are written.
    """

    type, name = "repeats", "find"

    def __init__(self, marks: str, found: str, documents: int, kept: int) -> None:
        super().__init__()
        self.marks = Path(marks)
        self.found = Path(found)
        self.documents = documents
        self.kept = kept

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        self.found.mkdir(parents=True, exist_ok=True)
        with self.track_time():
            runs = [np.load(path, mmap_mode="r") for path in sorted(self.marks.glob("*.npy"))]
            low, high = (2**64 * part // world_size for part in (rank, rank + 1))
            marks = sum(len(part) for part in _between(runs, "hash", low, high))
            pieces = 1 + marks // RUN
            for piece in range(pieces):
                bounds = (low + (high - low) * part // pieces for part in (piece, piece + 1))
                records = np.concatenate([np.empty(0, MARK), *_between(runs, "hash", *bounds)])
                found = _ordered(self._repeated(records), "task", "document", "unit")
                np.save(self.found / f"{rank:05d}-{piece:05d}.npy", found)

    def _repeated(self, marks: np.ndarray) -> np.ndarray:
        """Those of all marks of some texts that are to go. A text may occur more than once in a document."""
        marks = _ordered(marks, "hash", "task", "document")
        new_text = np.ones(len(marks), bool)
        new_text[1:] = marks["hash"][1:] != marks["hash"][:-1]
        new_document = new_text.copy()
        for key in ("task", "document"):
            new_document[1:] |= marks[key][1:] != marks[key][:-1]
        documents = np.cumsum(new_document)  # counted from the first of all
        text = np.cumsum(new_text) - 1
        starts = documents[new_text]
        counts = np.diff(np.append(starts, documents[-1] + 1 if len(marks) else 0))
        place = documents - starts[text]
        return marks[(counts[text] >= self.documents) & (place >= self.kept)]


def repeated(found: str, task: int) -> Iterator[tuple[int, list[int]]]:
    """(number of a document, its units that are to go) for the documents of a task, in order."""
    runs = [np.load(path, mmap_mode="r") for path in sorted(Path(found).glob("*.npy"))]
    merged = heapq.merge(*(_pairs(part) for part in _between(runs, "task", task, task + 1)))
    document = -1
    units: list[int] = []
    for number, unit in merged:
        if number != document:
            if units:
                yield document, units
            document, units = number, []
        units.append(unit)
    if units:
        yield document, units


def _ordered(records: np.ndarray, *keys: str) -> np.ndarray:
    """Sorted by the first key, then the second, ...; numpy's sort of records takes ten times as long."""
    return records[np.lexsort([records[key] for key in reversed(keys)])]


def _between(runs: list[np.ndarray], key: str, low: int, high: int) -> list[np.ndarray]:
    """The part of each run, sorted by a key, whose keys are in [low, high)."""
    parts = []
    for run in runs:
        keys = run[key]
        start, stop = (bisect_left(keys, bound, key=int) for bound in (low, high))
        if start < stop:
            parts.append(run[start:stop])
    return parts


def _pairs(marks: np.ndarray) -> Iterator[tuple[int, int]]:
    for start in range(0, len(marks), CHUNK):
        chunk = marks[start : start + CHUNK]
        yield from zip(chunk["document"].tolist(), chunk["unit"].tolist(), strict=True)
