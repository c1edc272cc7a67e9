"""Whether the checkpoints of runs are whole: every file is read and held against its manifest.

    python -m launch.verify runs/a [runs/b …]

The exit code is 1 where one is damaged, or the pointer to the newest is wrong. Nothing is changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data.cli import one_line_errors
from train.checkpoint import PREFIX, damage, path_of, pointed_to, steps
from train.rundir import RunDir


@dataclass(frozen=True)
class Finding:
    """What there is of one checkpoint. problem: what is wrong with it in one line; None where it is whole."""

    step: int
    files: int
    bytes: int
    written: datetime
    problem: str | None


def verify(directory: Path, passed: Callable[[int], None] = lambda count: None) -> list[Finding]:
    """Read every checkpoint of a run, oldest first. passed: see train.checkpoint.damage.

    Raises ValueError in one line where the directory is not a run's.
    """
    checkpoints = _checkpoints(directory)
    found = []
    for step in steps(checkpoints):
        path = path_of(checkpoints, step)
        problem = damage(path, passed)
        try:
            states = [file.lstat() for file in path.iterdir()]
        except FileNotFoundError:  # a run that trains has dropped it since
            continue
        written = max((state.st_mtime for state in states), default=path.stat().st_mtime)
        size = sum(state.st_size for state in states)
        found.append(Finding(step, len(states), size, datetime.fromtimestamp(written), problem))
    return found


def pointer(directory: Path) -> tuple[str, bool]:
    """What a run's pointer to its newest checkpoint says, in one line, and whether that is right."""
    checkpoints = _checkpoints(directory)
    there, pointed = steps(checkpoints), pointed_to(checkpoints)
    if isinstance(pointed, str):
        return pointed, False
    if not there:
        return "there is no checkpoint", True
    if pointed is None:
        return f"no pointer to step {there[-1]}, the newest; the next save makes one", False
    if pointed != there[-1]:
        line = f"the pointer is to step {pointed}, and the newest is {there[-1]}; the next save moves it"
        return line, False
    return f"the pointer is to step {pointed}, the newest", True


def left_over(directory: Path) -> list[str]:
    """Names of what killed saves left behind."""
    return sorted(path.name for path in _checkpoints(directory).glob(f".{PREFIX}*"))


def _checkpoints(directory: Path) -> Path:
    rundir = RunDir(directory)
    if not rundir.config.is_file():
        raise ValueError(
            f"{directory}: not a run's directory, for it holds no config.yaml; name one such as runs/demo"
        )
    return rundir.checkpoints


def show(directories: list[Path], console: Console) -> bool:
    """Verify runs, with a table of each; returns whether all is well."""
    files = [file for directory in directories for file in _checkpoints(directory).glob(f"{PREFIX}*/*")]
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Console(stderr=True)
    with Progress(*columns, console=bar, transient=True, disable=not bar.is_terminal) as progress:
        task = progress.add_task("", total=sum(file.lstat().st_size for file in files))
        found = [verify(directory, lambda n: progress.advance(task, n)) for directory in directories]
    well = True
    for directory, findings in zip(directories, found, strict=True):
        line, right = pointer(directory)
        console.print(Text(str(directory), "bold"), soft_wrap=True)
        if findings:
            console.print(_table(findings))
        console.print(Text(line, "" if right else "red"), soft_wrap=True)
        if names := left_over(directory):
            line = f"left over from saves under way or killed: {', '.join(names)}; the next save clears them"
            console.print(Text(line), soft_wrap=True)
        well = well and right and not any(finding.problem for finding in findings)
    return well


def _table(findings: list[Finding]) -> Table:
    table = Table()
    for name in ("step", "files", "size"):
        table.add_column(name, justify="right")
    table.add_column("written")
    table.add_column("state", overflow="fold")
    for finding in findings:
        state = Text(finding.problem, "red") if finding.problem else Text("whole", "green")
        numbers = (f"{finding.step:,}", str(finding.files), f"{finding.bytes / 1e6:,.1f} MB")
        table.add_row(*numbers, f"{finding.written:%Y-%m-%d %H:%M:%S}", state)
    return table


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.verify", description="Whether the checkpoints of runs are whole."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, such as runs/demo"
    )
    if not show(parser.parse_args().runs, Console()):
        sys.exit(1)


if __name__ == "__main__":
    main()
