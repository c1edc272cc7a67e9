"""Stages that take out what a corpus holds more than once."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)

from data.corpus.grams import grams, hashes
from data.corpus.repeats import Find, Mark, Units, repeated
from data.corpus.stage import Phase

BUFFERED = 4096  # records of datatrove's files read at once
SHINGLES = 512  # hashed at once, so that they stay in the cache
PARAGRAPH = 2**31  # added to the number of its first line
BLANK_LINES = re.compile(r"\n{3,}")


class Exact:
    """Drops documents whose text is that of an earlier one, but for white space and case."""

    def phases(self, folder: str, tasks: int) -> list[Phase]:
        marks, found = f"{folder}/marks", f"{folder}/found"
        return [
            Phase("mark", [Mark(marks, _whole)]),
            Phase("find", [Find(marks, found, documents=2, kept=1)], reads=False, tasks=tasks),
            Phase("drop", [DropRepeated(found)]),
        ]


class RepeatedLines:
    """Takes out lines and paragraphs that many documents hold, such as navigation and notes about cookies.

    documents: how many hold it at least. kept: the first so many of them keep it. length: bytes that it has
    at least; shorter lines go as parts of paragraphs. White space and case make no difference. A paragraph is
    a run of lines without a blank one. A document of which nothing is left is dropped.
    """

    def __init__(self, documents: int = 10, kept: int = 1, length: int = 16) -> None:
        if not 0 <= kept < documents:
            raise ValueError(f"kept: {kept} is not at least 0 and less than documents ({documents})")
        self.documents = documents
        self.kept = kept
        self.length = length

    def phases(self, folder: str, tasks: int) -> list[Phase]:
        marks, found = f"{folder}/marks", f"{folder}/found"
        return [
            Phase("mark", [Mark(marks, self.units)]),
            Phase("find", [Find(marks, found, self.documents, self.kept)], reads=False, tasks=tasks),
            Phase("remove", [RemoveLines(found)]),
        ]

    def units(self, text: str) -> Units:
        lines = [" ".join(line.split()).lower() for line in text.split("\n")]
        parts = list(enumerate(lines))
        parts += [(PARAGRAPH + first, "\n".join(lines[first:stop])) for first, stop in _paragraphs(lines)]
        encoded = ((number, part.encode()) for number, part in parts)
        return [
            (number, xxhash.xxh3_64_intdigest(part)) for number, part in encoded if len(part) >= self.length
        ]


class Near:
    """Drops all but one of documents that are nearly alike: MinHash (Broder 1997), datatrove's four phases.

    Documents with a share s of their runs of n words in common are found with a probability of
    1 - (1 - s**hashes)**buckets: 0.75 at s = 0.7, 0.90 at 0.75, 0.98 at 0.8. FineWeb's 14 x 8 (arXiv
    2406.17557) has as many hashes but misses a third of the copies with 5 % of the words changed. Which one
    stays depends on the text alone. The third phase holds all documents that have a near-duplicate in memory,
    about 300 bytes each.
    """

    def __init__(self, n: int = 5, buckets: int = 16, hashes: int = 7) -> None:
        self.config = MinhashConfig(n_grams=n, num_buckets=buckets, hashes_per_bucket=hashes)

    def phases(self, folder: str, tasks: int) -> list[Phase]:
        signatures, pairs, removed = (f"{folder}/{name}" for name in ("signatures", "pairs", "removed"))
        config = self.config
        buckets = MinhashDedupBuckets(signatures, pairs, config=config, lines_to_buffer=BUFFERED)
        cluster = MinhashDedupCluster(pairs, removed, config=config, lines_to_buffer=BUFFERED)
        return [
            Phase("sign", [Sign(signatures, config)]),
            Phase("pair", [buckets], reads=False, tasks=config.num_buckets),
            Phase("cluster", [cluster], reads=False),
            Phase("drop", [DropNear(removed)]),
        ]


class Sign(MinhashDedupSignature):
    """datatrove's signatures, but of words of any language, in bounded memory, and passing documents on.

    Its own words come from spaCy, whose rules depend on the language and take most of the time, and a long
    document takes a kilobyte per word.
    """

    def __init__(self, folder: str, config: MinhashConfig) -> None:
        super().__init__(folder, config, skip_existing_sigs=True)

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        names = [f"bucket_{bucket:03d}/{rank:05d}.minhash.sig" for bucket in range(self.config.num_buckets)]
        files = [self.output_folder.open(name, mode="wb") for name in names]
        record = struct.Struct(f"<{self.config.hashes_per_bucket}QI")
        for number, document in enumerate(data):
            with self.track_time():
                shingles = self.get_shingles(document.text)
                if len(shingles):
                    for file, signature in zip(files, self.get_signature(shingles), strict=True):
                        file.write(record.pack(*signature, number))
            yield document
        for file in files:
            file.close()
        super().run([], rank, world_size)  # finds the files and sorts them

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [different runs of words, 1]"""
        return np.unique(grams(hashes(text), self.config.n_grams))[:, None]

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        parts = [
            super(Sign, self).get_signature(shingles[start : start + SHINGLES])
            for start in range(0, len(shingles), SHINGLES)
        ]
        return np.min(np.array(parts, np.uint64), axis=0).tolist()


class DropRepeated:
    """Drops the documents that have a unit in the list of what is repeated."""

    def __init__(self, found: str) -> None:
        self.found = found

    def begin(self, task: int) -> None:
        self._numbers = Numbered((number, True) for number, _ in repeated(self.found, task))

    def __call__(self, document: Document) -> str | None:
        return "exact duplicate" if self._numbers.next() else None


class DropNear:
    """Drops the documents that the clusters name: datatrove's fourth phase, but counted as all stages are."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def begin(self, task: int) -> None:
        path = Path(self.folder, f"{task:06d}.remove")
        numbers = np.fromfile(path, "<u4").tolist() if path.exists() else []
        self._numbers = Numbered((number, True) for number in numbers)

    def __call__(self, document: Document) -> str | None:
        return "near-duplicate" if self._numbers.next() else None


class RemoveLines:
    """Takes the lines and paragraphs out that are in the list of what is repeated."""

    def __init__(self, found: str) -> None:
        self.found = found

    def begin(self, task: int) -> None:
        self._numbers = Numbered(repeated(self.found, task))

    def __call__(self, document: Document) -> str | None:
        units = self._numbers.next()
        if not units:
            return None
        lines = document.text.split("\n")
        ends = dict(_paragraphs(lines))
        gone: set[int] = set()
        for unit in units:
            first = unit % PARAGRAPH
            gone |= set(range(first, ends[first] if unit >= PARAGRAPH else first + 1))
        text = "\n".join(line for number, line in enumerate(lines) if number not in gone)
        document.text = BLANK_LINES.sub("\n\n", text).strip("\n")
        return None if document.text.strip() else "only repeated lines"


class Numbered:
    """What is known of some documents, in order, asked for one document after the other."""

    def __init__(self, known: Iterator[tuple[int, Any]]) -> None:
        self._known = known
        self._number = -1
        self._next = next(known, None)

    def next(self) -> Any:
        """What is known of the next document; None for nothing."""
        self._number += 1
        if self._next is None or self._next[0] != self._number:
            return None
        found = self._next[1]
        self._next = next(self._known, None)
        return found


def _whole(text: str) -> Units:
    return [(0, xxhash.xxh3_64_intdigest(" ".join(text.split()).lower()))]


def _paragraphs(lines: list[str]) -> Iterator[tuple[int, int]]:
    """(first line, line after the last) of the paragraphs of more than one line."""
    first = 0
    for number, line in enumerate([*lines, ""]):
        if not line or line.isspace():
            if number > first + 1:
                yield first, number
            first = number + 1
