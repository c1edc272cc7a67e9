"""The steps that bring documents into a task and out of it: from the sources, and through files between."""

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data import sources
from data.cli import one_line, standing_at
from data.corpus.counts import Counts, tokens
from data.corpus.stage import COUNTED, Tally, counted
from data.sources import Source

LONGEST = 50_000_000  # characters of a document
LEVEL = 3  # of zstandard
MOST_KNOWN = 1000  # licences and dates of a source that are remembered
SUFFIX = ".jsonl.zst"


@dataclass
class Input:
    """Where raw documents come from. licence, retrieved (ISO date): what is known of all of them."""

    source: Source
    licence: str | None = None
    retrieved: str | None = None


class Progress:
    """Says in a small file how many documents and bytes a task has read, about once a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.bytes = 0
        self._said = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def passed(self, size: int) -> None:
        self.documents += 1
        self.bytes += size
        if time.monotonic() - self._said > 1:
            self.say()

    def say(self) -> None:
        self.path.write_text(f"{self.documents} {self.bytes}")
        self._said = time.monotonic()


class Read(PipelineStep):
    """The share of a task in the documents of all inputs, pieces of long ones joined.

    Where a source has `files()` and can read some of them (`documents(files)`), and there are enough for
    every task, files are dealt out; else documents are, and every task reads past those of the others.
    A document of more than LONGEST characters is dropped; what is too long is never in memory.
    """

    type, name = "read", "inputs"

    def __init__(self, inputs: dict[str, Input], tallies: Path, progress: Path) -> None:
        super().__init__()
        self.inputs = inputs
        self.tallies = tallies
        self.progress = progress

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = Tally()
        progress = Progress(self.progress / f"{rank:05d}")
        for name, given in self.inputs.items():
            with standing_at(f"data.source.inputs.{name}.source"):
                for pieces in _share(given.source, rank, world_size):
                    with self.track_time():
                        document = _joined(name, given, pieces, tally)
                    if document is not None:
                        progress.passed(document.metadata[COUNTED][0])
                        yield document
        progress.say()
        tally.save(self.tallies / f"{rank:05d}.json")


def _share(source: Any, rank: int, tasks: int) -> Iterator[Iterable[sources.Document]]:
    """The pieces of each document of a task."""
    files = source.files() if hasattr(source, "files") else []
    if len(files) >= tasks:
        pieces, tasks, rank = source.documents(files[rank::tasks]), 1, 0
    else:
        pieces = source.documents()
    for number, (_, group) in enumerate(itertools.groupby(pieces, _Boundaries())):
        if number % tasks == rank:
            yield group


class _Boundaries:
    """Numbers documents by the pieces that end them: ids need not differ."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, piece: sources.Document) -> int:
        number = self.number
        self.number += piece.ends
        return number


def _joined(name: str, given: Input, pieces: Iterable[sources.Document], tally: Tally) -> Document | None:
    """A whole document with its counts; None where it is too long or empty."""
    texts: list[str] = []
    size = [0, 0, 0]  # characters, bytes, tokens
    first = None
    for piece in pieces:
        first = first or piece
        text = piece.text.encode("utf-8", "replace").decode()  # halves of surrogate pairs can't be stored
        size = [size[0] + len(text), size[1] + len(text.encode()), size[2] + tokens(text)]
        if size[0] <= LONGEST:
            texts.append(text)
        else:
            del texts[1:]  # one is enough for the example
    if first is None or not size[0]:
        return None
    id = f"{name}/{first.id}".encode("utf-8", "replace").decode()
    counts: Counts = {"documents": 1, "bytes": size[1], "tokens": size[2]}
    tally.enter(name, counts)
    if size[0] > LONGEST:
        tally.drop("too long", name, id, counts, "".join(texts[:1]))
        return None
    tally.keep(name, counts)
    known = {"licence": given.licence, "retrieved": given.retrieved, **first.about, "source": name}
    about = {key: str(value) for key, value in known.items() if value is not None}
    return Document("".join(texts), id, metadata={**about, COUNTED: size[1:]})


class Load(PipelineStep):
    """The documents that a task wrote in the phase before."""

    type, name = "read", "documents"

    def __init__(self, folder: Path, progress: Path) -> None:
        super().__init__()
        self.folder = folder
        self.progress = progress

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        progress = Progress(self.progress / f"{rank:05d}")
        for row in read_rows(self.folder / f"{rank:05d}{SUFFIX}"):
            document = Document(row["text"], row["id"], metadata=row["about"])
            progress.passed(document.metadata[COUNTED][0])
            yield document
        progress.say()


class Write(PipelineStep):
    """Writes the documents of a task to a file, which gets its name when it is complete.

    summaries: where what the card says of them goes, if they are final; they then leave without their counts.
    """

    type, name = "write", "documents"

    def __init__(self, folder: Path, summaries: Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.summaries = summaries

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        import zstandard

        path = self.folder / f"{rank:05d}{SUFFIX}"
        # Of its own process: on a cluster a task may still run that was thought to be dead.
        aside = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        summary = Summary()
        with aside.open("wb") as file:
            compressor = zstandard.ZstdCompressor(LEVEL, write_checksum=True)
            with compressor.stream_writer(file, closefd=False) as out:
                for document in data:
                    with self.track_time():
                        if self.summaries is not None:
                            summary.add(document)
                            del document.metadata[COUNTED]
                        row = {"id": document.id, "text": document.text, "about": document.metadata}
                        line = json.dumps(row, ensure_ascii=False, default=str)
                        out.write(line.encode() + b"\n")
                    yield document
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        if self.summaries is not None:
            summary.save(self.summaries / f"{rank:05d}.json", path)


class Summary:
    """What the card says of the final documents of a task."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.languages: Counter[str] = Counter()
        self.lengths: Counter[str] = Counter()
        self.known: dict[str, dict[str, set[str]]] = {}

    def add(self, document: Document) -> None:
        about = document.metadata
        self.tally.keep(about["source"], counted(document))
        self.languages[about.get("language", "unknown")] += 1
        self.lengths[str(1 << len(document.text).bit_length() - 1)] += 1
        known = self.known.setdefault(about["source"], {"licence": set(), "retrieved": set()})
        for key, values in known.items():
            if key in about and len(values) < MOST_KNOWN:
                values.add(about[key][:10] if key == "retrieved" else about[key])

    def save(self, path: Path, file: Path) -> None:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        documents = sum(self.languages.values())
        content = {
            "sources": self.tally.after,
            "languages": self.languages,
            "lengths": self.lengths,
            "known": {
                s: {key: sorted(values) for key, values in known.items()} for s, known in self.known.items()
            },
            "file": {
                "file": file.name,
                "sha256": digest,
                "bytes": file.stat().st_size,
                "documents": documents,
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def read_rows(path: Path, count: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl.zst file. ValueError where it is damaged or holds another number of rows."""
    import zstandard

    number = 0
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            for line in _lines(reader):
                number += 1
                yield json.loads(line)
        if count not in (None, number):  # a file that was cut off need not end in an error
            raise OSError(f"holds {number} documents, not {count}")
    except (OSError, zstandard.ZstdError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {one_line(error)}; delete its corpus and build it again") from error


def _lines(reader: Any) -> Iterator[bytes]:
    held: list[bytes] = []
    while chunk := reader.read(2**20):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*held, line])
            held = []
        held.append(rest)
