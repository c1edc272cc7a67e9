"""A corpus: raw documents of several inputs, through stages that clean them, to files that stay.

The folder is `<directory>/<name>-<fingerprint>`: documents/, card.json and card.html. It is complete when
card.json is there. One process builds it while others wait; one that is killed leaves its finished tasks, and
the next goes on from there. The files are the same, byte for byte, whatever the executor, the number of
workers and the number of times that it was killed.
"""

import fcntl
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from data.cli import instantiate, standing_at
from data.corpus import card, summary
from data.corpus.executors import WORKERS, Executor
from data.corpus.files import Input, read_rows
from data.corpus.plan import DOCUMENTS, READ, Pass, passes, tallies
from data.corpus.progress import Meter
from data.corpus.stage import Step, Tally, is_ours, naming
from data.sources import Document, pieces

VERSION = 1  # of this package: raise it when the same text and settings would give other documents
LOCAL = {"_target_": "data.corpus.executors.Local"}
NAME = re.compile(r"\w[\w-]*")


class Corpus:
    """A source of clean documents, which it makes of raw ones when it is first asked for them.

    inputs: by name, {"source": a source's node, "licence", "retrieved"}. stages: by name, in order, a
    stage's node or null. executor: its node. tasks: parts that the documents are dealt into; their order
    follows from it, so it is not left to the number of cores. Nodes come as they stand in the configuration,
    which must say `_recursive_: false`: what they say is kept in the card.
    """

    def __init__(
        self,
        inputs: dict[str, Any],
        stages: dict[str, Any],
        executor: dict[str, Any] | None = None,
        tasks: int = 16,
        directory: str = "corpora",
        name: str = "corpus",
    ) -> None:
        if tasks < 1:
            raise ValueError(f"data.source.tasks: {tasks} is less than 1")
        if not inputs:
            raise ValueError("data.source.inputs: is empty; name at least one")
        stages = {key: node for key, node in stages.items() if node is not None}
        self.settings: dict[str, Any] = {"inputs": inputs, "stages": stages, "tasks": tasks}
        self.name = name
        self.directory = Path(directory)
        self.tasks = tasks
        self._inputs = {key: _input(node, f"data.source.inputs.{key}") for key, node in inputs.items()}
        self._stages = {key: _object(node, f"data.source.stages.{key}") for key, node in stages.items()}
        self._executor: Executor = _object(executor or LOCAL, "data.source.executor")
        for key in (*inputs, *stages):
            if not NAME.fullmatch(str(key)) or key == READ:
                raise ValueError(f"data.source: {key} cannot be a name; take letters, digits, - and _")

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that the documents depend on. Raises ValueError on a missing input."""
        content = json.dumps([VERSION, self.settings, self._stamps], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def folder(self) -> Path:
        return self.directory / f"{self.name}-{self.fingerprint[:12]}"

    def page(self) -> Path:
        return self.folder / card.PAGE

    def inputs(self) -> dict[str, Any]:
        return {"corpus": self.fingerprint}

    def size(self) -> int | None:
        """Bytes of the clean text, once it is there."""
        path = self.folder / card.CARD
        return card.read(self.folder)["final"]["bytes"] if path.is_file() else None

    def documents(self) -> Iterator[Document]:
        folder = self.build()
        for file in card.read(folder)["final"]["files"]:
            for row in read_rows(folder / file["file"], file["documents"]):
                about = {key: str(value) for key, value in row["about"].items()}
                yield from pieces(row["id"], [row["text"]], about)

    def build(self, progress: bool = True) -> Path:
        """The folder of the corpus; made if it is not there yet, finished if it is in part.

        Raises ValueError in one line on anything wrong with the inputs or the stages; finished tasks stay.
        """
        folder, work = self.folder, self.folder / "work"
        while not (folder / card.CARD).is_file() or work.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _same_file(folder / "lock", lock.fileno()):
                    continue  # its owner has finished meanwhile
                if not (folder / card.CARD).is_file():
                    self._make(folder, work, progress)
                shutil.rmtree(work)
                (folder / "lock").unlink()
        return folder

    @cached_property
    def _stamps(self) -> dict[str, Any]:
        inputs, stages = {}, {}
        for key, given in self._inputs.items():
            with standing_at(f"data.source.inputs.{key}.source"):
                inputs[key] = given.source.inputs()
        for key, stage in self._stages.items():
            if hasattr(stage, "inputs"):
                with naming(key, stage):
                    stages[key] = stage.inputs()
        # What is ours changes with VERSION.
        own = {key: _code(stage) for key, stage in self._stages.items() if not is_ours(stage)}
        return {"inputs": inputs, "stages": stages, "code": own}

    def _make(self, folder: Path, work: Path, progress: bool) -> None:
        work.mkdir(exist_ok=True)
        with (work / WORKERS).open("w") as workers:
            fcntl.flock(workers, fcntl.LOCK_EX)  # until those of a process that was killed have ended
        plan = passes(self._inputs, self._stages, self.tasks, folder, work)
        total = self._size()
        with _quiet(work):
            for number, part in enumerate(plan):
                self._run(part, f"{number + 1}/{len(plan)} {part.title}", total, progress)
                if part.documents:
                    total = ("documents", self._check(part, work))
        for left in (folder / DOCUMENTS).glob(".*"):  # half-written by a worker that was killed
            left.unlink()
        content = summary.card(self, plan, work)
        aside = work / "card"
        aside.mkdir(exist_ok=True)
        (aside / card.CARD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        card.write(aside)
        for file in (card.PAGE, card.CARD):  # the last makes it complete
            os.replace(aside / file, folder / file)

    def _run(self, part: Pass, title: str, total: tuple[str, int | None], progress: bool) -> None:
        of, size = total if part.documents else ("tasks", part.tasks)
        part.folder.mkdir(exist_ok=True)
        shutil.rmtree(part.folder / "errors", ignore_errors=True)
        name = f"{self.folder.name}-{part.folder.name}"
        executor = self._executor.make(part.steps, part.tasks, part.folder, name)
        with Meter(title, part.folder, of, size, progress):
            executor.run()
        incomplete = executor.get_incomplete_ranks()
        if incomplete:
            raise _failure(part, len(incomplete))
        for path in part.obsolete:
            shutil.rmtree(path, ignore_errors=True)

    def _check(self, part: Pass, work: Path) -> int:
        """How many documents are left; refuses inputs without documents, and stages that leave none."""
        read = Tally.load(tallies(work, READ).iterdir())
        for name in self._inputs:
            if name not in read.before:
                raise ValueError(f"data.source.inputs.{name}: holds no documents; leave it out")
        entry = read.card()
        left = entry["out"]["documents"]
        if not left:
            raise ValueError(
                f"data.source.inputs: all are dropped ({_reasons(entry)}); cut them into smaller ones"
            )
        for step in part.steps:
            if isinstance(step, Step):
                entry = Tally.load(step.folder.iterdir()).card()
                left = entry["out"]["documents"]
                if not left:
                    raise ValueError(
                        f"data.source.stages.{step.name}: drops every document ({_reasons(entry)});"
                        " change it, or leave it out with null"
                    )
        return left

    def _size(self) -> tuple[str, int | None]:
        """About how much text is to be read."""
        sizes = [given.source.size() for given in self._inputs.values()]
        return "bytes", None if None in sizes else sum(size for size in sizes if size is not None)


def _reasons(entry: dict[str, Any]) -> str:
    return ", ".join(f"{why} {counts['documents']:,}" for why, counts in entry["dropped"].items())


def _input(node: Any, key: str) -> Input:
    if not isinstance(node, Mapping) or "source" not in node:
        raise ValueError(f"{key}: must name its source, as {key}.source._target_=...")
    known = {"source", "licence", "retrieved"}
    for unknown in node.keys() - known:
        raise ValueError(f"{key}.{unknown}: unknown key; an input knows {', '.join(sorted(known))}")
    rest = {name: None if value is None else str(value) for name, value in node.items() if name != "source"}
    return Input(_object(node["source"], f"{key}.source"), **rest)


def _object(node: Any, key: str) -> Any:
    if not isinstance(node, dict | list | str | int | float | None):
        raise ValueError("data.source._recursive_: must be false for a corpus, which makes its parts itself")
    return instantiate(node, key)


def _failure(part: Pass, incomplete: int) -> Exception:
    """What ended a pass: the mistake of a person in one line, or ours with its trace."""
    for path in sorted((part.folder / "errors").glob("*.json")):
        error = json.loads(path.read_text(encoding="utf-8"))
        if error["mistake"]:
            return ValueError(error["message"])
        return RuntimeError(f"{part.title}: {error['message']}\n{error['trace']}")
    return ValueError(
        f"data.source.executor: {incomplete} of {part.tasks} tasks of {part.title} did not end, perhaps for "
        f"lack of memory; the same command goes on from there; see {part.folder}"
    )


class _quiet:
    """What datatrove tells of its work goes to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        from loguru import logger

        logger.remove()
        self._file = logger.add(self.folder / "log.txt")

    def __exit__(self, *_: object) -> None:
        from loguru import logger

        logger.remove(self._file)


def _code(stage: Any) -> str:
    """A hash of the module that a user's stage stands in: changed, it may clean in another way."""
    module = sys.modules[type(stage).__module__]
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
