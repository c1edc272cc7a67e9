"""How far a phase of a corpus is, on a terminal."""

import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 0.5  # seconds


class Meter:
    """A bar for one phase: documents, their rate, and the time left where it is known.

    folder: of the phase; its tasks say there how far they are. of: what the total counts.
    """

    def __init__(self, name: str, folder: Path, of: str, total: int | None, shown: bool) -> None:
        console = Console(stderr=True)
        self._folder = folder
        self._of = of
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[documents]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task(name, total=total, documents="")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Meter":
        if not self._progress.disable:
            self._progress.start()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if not self._progress.disable:
            self._thread.join()
            self._progress.stop()

    def _follow(self) -> None:
        first, started = self._done()["documents"], time.monotonic()
        while not self._ended.wait(EVERY):
            done = self._done()
            rate = (done["documents"] - first) / (time.monotonic() - started)
            text = f"{done['documents']:,} documents  {rate:,.0f}/s" if done["documents"] else ""
            self._progress.update(self._task, completed=done[self._of], documents=text)

    def _done(self) -> dict[str, int]:
        done = {"documents": 0, "bytes": 0, "tasks": len(list(self._folder.glob("completions/*")))}
        for path in self._folder.glob("progress/*"):
            said = path.read_text().split()  # nothing, while it is being written
            if said:
                done["documents"] += int(said[0])
                done["bytes"] += int(said[1])
        return done
