"""The passes over a corpus that its stages need: as few as can be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data.corpus.files import Input, Load, Read, Write
from data.corpus.stage import Phase, Step

READ = "read"  # the stage that all others come after
DOCUMENTS = "documents"


@dataclass
class Pass:
    """One run of an executor. Stages that follow each other share it, as far as none needs all documents.

    documents: whether it reads and writes them. owners: the stage that each step belongs to. folder: for what
    datatrove and its tasks leave. obsolete: what nobody needs when it is done.
    """

    title: str
    folder: Path
    tasks: int
    documents: bool
    steps: list[PipelineStep] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    obsolete: list[Path] = field(default_factory=list)

    def add(self, owner: str, steps: Sequence[PipelineStep]) -> None:
        self.steps += steps
        self.owners += [owner] * len(steps)


def passes(
    inputs: Mapping[str, Input], stages: Mapping[str, Any], tasks: int, folder: Path, work: Path
) -> list[Pass]:
    """What is to run, in order; the documents of the last pass go to folder/documents."""
    plan: list[Pass] = []
    first = _reading(plan, work, tasks, READ)
    first.add(READ, [Read(dict(inputs), tallies(work, READ), first.folder / "progress")])
    for name, stage in stages.items():
        scratch = work / "stages" / name
        phases = stage.phases(str(scratch), tasks) if hasattr(stage, "phases") else [Phase(name, [stage])]
        for phase in phases:
            if not phase.reads:
                title = f"{name}: {phase.name}"
                plan.append(Pass(title, work / f"{len(plan):02d}", phase.tasks, False))
            elif not plan[-1].documents:
                _reading(plan, work, tasks, name)
            elif name not in plan[-1].owners:
                plan[-1].title += f", {name}"
            steps = [
                s if isinstance(s, PipelineStep) else Step(name, s, tallies(work, name)) for s in phase.steps
            ]
            plan[-1].add(name, steps)
        plan[-1].obsolete.append(scratch)
    if not plan[-1].documents:
        _reading(plan, work, tasks, "write")
    reading = [part for part in plan if part.documents]
    for part in reading[:-1]:
        part.add("write", [Write(part.folder / DOCUMENTS)])
    reading[-1].add("write", [Write(folder / DOCUMENTS, work / "final")])
    return plan


def tallies(work: Path, stage: str) -> Path:
    return work / "tallies" / stage


def _reading(plan: list[Pass], work: Path, tasks: int, title: str) -> Pass:
    """A new pass over the documents, which begins with those of the pass before."""
    part = Pass(title, work / f"{len(plan):02d}", tasks, True)
    before = [other for other in plan if other.documents]
    if before:
        part.add(READ, [Load(before[-1].folder / DOCUMENTS, part.folder / "progress")])
        part.obsolete.append(before[-1].folder / DOCUMENTS)
    plan.append(part)
    return part
