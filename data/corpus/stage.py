"""Stages of a corpus, run by datatrove, and what is counted of them.

A stage for single documents is any object that can be pickled with

    def __call__(self, document: datatrove.data.Document) -> str | None

It may edit the document in place and returns the reason to drop it, or None. Where it has them, `replaced`
(a Counter that it adds to) is reported, `inputs()` says which files it depends on, and `begin(task)` is
called before the first document of a task. A stage for the whole corpus has instead

    def phases(self, folder: str, tasks: int) -> list[Phase]
"""

import hashlib
import heapq
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data.cli import one_line, under
from data.corpus.counts import COUNTS, Counts, none, tokens, total

COUNTED = "counted"  # key of the metadata: bytes and tokens of the text as it is now
EXAMPLES = 5  # of each reason
EXAMPLE_CHARACTERS = 600
MOST_REASONS = 100
Stage = Callable[[Document], str | None]


class StageError(ValueError):
    """What a stage of one's own raised, in one line; its cause is the exception itself."""


@contextmanager
def naming(name: str, stage: Any, document: Document | None = None) -> Iterator[None]:
    """For a call of a stage: what it raises names the stage by its key, and the document.

    Of a stage of one's own that is a StageError, whatever it was. Of ours it is a ValueError where the stage
    refuses what it was given, and for bugs a RuntimeError.
    """
    try:
        yield
    except Exception as error:
        key = f"data.source.stages.{name}"
        if is_ours(stage) and document is None and isinstance(error, ValueError | OSError):
            raise ValueError(under(key, one_line(error), type(stage))) from error
        what = " ".join("".join(traceback.format_exception_only(error)).split())
        at = f", at document {document.id} of source {document.metadata['source']}" if document else ""
        raise (RuntimeError if is_ours(stage) else StageError)(f"{key}: {what}{at}") from error


def is_ours(stage: Any) -> bool:
    return type(stage).__module__.startswith("data.corpus.")


@dataclass
class Phase:
    """A part of a stage for the whole corpus; all tasks of a phase are done before the next one begins.

    steps: where the phase reads documents, each step passes them on, all or some, in their order. tasks: into
    how many it is dealt; as many as the corpus has where it reads, else 1.
    """

    name: str
    steps: list[PipelineStep]
    reads: bool = True
    tasks: int = 1


def counted(document: Document) -> Counts:
    """The counts of a document, remembered on it; who changes its text calls recount."""
    if COUNTED not in document.metadata:
        recount(document)
    size, pieces = document.metadata[COUNTED]
    return {"documents": 1, "bytes": size, "tokens": pieces}


def recount(document: Document) -> None:
    document.metadata[COUNTED] = [len(document.text.encode()), tokens(document.text)]


@dataclass
class Tally:
    """What went into a stage and what came of it, by source; the part of one task, or all together."""

    before: dict[str, Counts] = field(default_factory=dict)
    after: dict[str, Counts] = field(default_factory=dict)
    dropped: dict[str, Counts] = field(default_factory=dict)
    edited: int = 0
    replaced: dict[str, int] = field(default_factory=dict)
    # reason -> [hash of the id, id, source, text], the smallest hashes: the same however it is dealt out
    examples: dict[str, list[list[str]]] = field(default_factory=dict)

    def enter(self, source: str, counts: Counts) -> None:
        _add(self.before, source, counts)

    def keep(self, source: str, counts: Counts) -> None:
        _add(self.after, source, counts)

    def drop(self, reason: str, source: str, id: str, counts: Counts, text: str) -> None:
        _add(self.dropped, reason, counts)
        digest = hashlib.blake2b(id.encode(), digest_size=8).hexdigest()
        self._example(reason, [digest, id, source, text[:EXAMPLE_CHARACTERS]])

    def add(self, other: "Tally") -> None:
        for mine, theirs in (
            (self.before, other.before),
            (self.after, other.after),
            (self.dropped, other.dropped),
        ):
            for key, counts in theirs.items():
                _add(mine, key, counts)
        self.edited += other.edited
        self.replaced = dict(Counter(self.replaced) + Counter(other.replaced))
        for reason, examples in other.examples.items():
            for example in examples:
                self._example(reason, example)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self)), encoding="utf-8")

    @classmethod
    def load(cls, paths: Iterable[Path]) -> "Tally":
        """The sum of the tallies in these files."""
        result = cls()
        for path in paths:
            result.add(cls(**json.loads(path.read_text(encoding="utf-8"))))
        return result

    def card(self) -> dict[str, Any]:
        """Its part of a stage's entry in card.json."""
        return {
            "in": total(self.before.values()),
            "out": total(self.after.values()),
            "dropped": dict(sorted(self.dropped.items())),
            "edited": self.edited,
            "replaced": dict(sorted(self.replaced.items())),
            "by_source": {
                source: {"in": counts, "out": self.after.get(source, none())}
                for source, counts in sorted(self.before.items())
            },
            "examples": [
                {"reason": reason, "id": id, "source": source, "text": text}
                for reason, examples in sorted(self.examples.items())
                for _, id, source, text in examples
            ],
        }

    def _example(self, reason: str, example: list[str]) -> None:
        found = self.examples.get(reason, [])
        if len(found) < EXAMPLES or example < found[-1]:
            self.examples[reason] = heapq.nsmallest(EXAMPLES, [*found, example])


def _add(to: dict[str, Counts], key: str, counts: Counts) -> None:
    mine = to.setdefault(key, none())
    for unit in COUNTS:
        mine[unit] += counts[unit]


class Step(PipelineStep):
    """Runs a stage on every document of a task and saves what it counted when the task ends.

    folder: where the tallies of its tasks go. Raises ValueError where the stage returns no reason.
    """

    type = "stage"

    def __init__(self, name: str, stage: Stage, folder: Path) -> None:
        self.name = name
        self.stage = stage
        self.folder = folder
        super().__init__()

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = Tally()
        if hasattr(self.stage, "begin"):
            with naming(self.name, self.stage):
                self.stage.begin(rank)
        for document in data:
            if self._keeps(document, tally):
                yield document
        tally.replaced = dict(getattr(self.stage, "replaced", {}))
        tally.save(self.folder / f"{rank:05d}.json")

    def _keeps(self, document: Document, tally: Tally) -> bool:
        text, source = document.text, document.metadata["source"]
        before = counted(document)
        tally.enter(source, before)
        with naming(self.name, self.stage, document), self.track_time():
            reason = self.stage(document)
        if reason is None and (not document.text or document.text.isspace()):
            reason = "no text left"
        if reason is None:
            if document.text != text:
                recount(document)
                tally.edited += 1
            tally.keep(source, counted(document))
            return True
        if not isinstance(reason, str):
            raise ValueError(
                f"data.source.stages.{self.name}: returned {reason!r}, not a reason to drop or None"
            )
        tally.drop(reason, source, document.id, before, text)
        if len(tally.dropped) > MOST_REASONS:
            raise ValueError(
                f"data.source.stages.{self.name}: gives more than {MOST_REASONS} reasons; few would do"
            )
        return False
