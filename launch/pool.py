"""Processes beside each other, as many at a time as there are slots, and what is said of them."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from launch.launchers import Process
from launch.report_page import duration
from train.stop import INTERRUPTED, REQUEUE, current


class Task(Protocol):
    """What a process does."""

    @property
    def name(self) -> str: ...

    def start(self, slot: int) -> Process:
        """Its process. slot: a number that no other has that runs beside it."""

    def told(self, code: int) -> str:
        """How it ended, in a line. code: the process's."""


class Pool:
    """A signal is passed on to the processes that run, which are to end by it; no other is started then."""

    def __init__(self, tasks: Sequence[Task], console: Console, slots: int) -> None:
        self.total, self.console, self.slots = len(tasks), console, slots
        self.waiting, self.free = deque(tasks), deque(range(slots))
        self.running: dict[int, tuple[Process, float]] = {}  # by slot, with their start
        self.seconds: list[float] = []  # of those that have ended
        # The task that has ended, with its slot and exit code; or None and the number of a signal.
        self.events: SimpleQueue[tuple[Task | None, int, int]] = SimpleQueue()
        self.code = 0
        columns = "runs", MofNCompleteColumn(), BarColumn(), "{task.fields[now]}"
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bar = self.progress.add_task("runs", total=self.total, now="")

    def work(self) -> None:
        """Returns when all have ended. Raises SystemExit when a signal has ended those that ran."""
        with (
            self.progress,
            current() as stop,
            stop.passing_on(lambda number: self.events.put((None, 0, number))),
        ):
            try:
                self._start()
                while self.running:
                    task, slot, value = self.events.get()
                    if task is None:
                        self._signalled(value)
                    else:
                        self._ended(task, slot, value)
                        self._start()
            finally:
                for process, _ in self.running.values():
                    process.kill()
                    process.wait()
        if self.code:
            self.console.print("stopped; the same command goes on from here")
            sys.exit(self.code)

    def _start(self) -> None:
        while self.waiting and self.free and not self.code:
            task, slot = self.waiting.popleft(), self.free.popleft()
            process = task.start(slot)
            self.running[slot] = process, time.monotonic()
            threading.Thread(target=self._wait, args=(task, slot, process), daemon=True).start()
        now = f"{len(self.running)} running, {self._eta()}"
        self.progress.update(self.bar, completed=len(self.seconds), now=now)

    def _wait(self, task: Task, slot: int, process: Process) -> None:
        self.events.put((task, slot, process.wait()))

    def _signalled(self, number: int) -> None:
        self.code = self.code or REQUEUE
        for process, _ in self.running.values():
            process.send_signal(number)

    def _ended(self, task: Task, slot: int, code: int) -> None:
        _, began = self.running.pop(slot)
        self.free.append(slot)
        if self.code:
            self.code = INTERRUPTED if code == INTERRUPTED else self.code
            return
        self.seconds.append(time.monotonic() - began)
        line = f"{len(self.seconds)}/{self.total} {task.name}: {task.told(code)}"
        eta = "" if self.console.is_terminal else f", {self._eta()}"
        self.console.print(f"{line} ({duration(self.seconds[-1])}{eta})", markup=False, soft_wrap=True)

    def _eta(self) -> str:
        """Tasks count as equally long, those under way as half done."""
        left = len(self.waiting) + len(self.running) / 2
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else None
        return f"ETA {duration(mean and left * mean / self.slots)}"
