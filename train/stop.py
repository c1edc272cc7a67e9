"""How a run is asked to end: by a signal or the wall-clock limit. Imports nothing heavy: it is there first.

Python's own signal handlers run in the main thread, between two of its instructions: never while it waits
in C++, for other ranks or a compiler. What must happen even then is done by a thread, which C code wakes at
once through a socket (signal.set_wakeup_fd); it runs as long as what the main thread waits in let go of
Python's lock, as all of torch does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

REQUEUE = 75  # exit code: everything is saved, the same command goes on (EX_TEMPFAIL)
INTERRUPTED = 130  # exit code: a person wanted the end at once
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
APART = 0.5  # seconds between two SIGINT: terminals and launchers deliver one Ctrl-C twice
STUCK, UNWOUND = 3.0, 10.0  # seconds for the main thread to notice a signal, and to clear up then
STARTED = "ISOFLOP_STARTED"  # set by a launcher for its ranks: its time.monotonic() when the run was started


class Stop:
    """What this process does on SIGTERM, SIGINT and SIGUSR1; made in its main thread, before anything else.

    Until `training()`, there is nothing to save: the process ends at once, with REQUEUE, or INTERRUPTED on
    SIGINT. From then on `requested` says that it should end, and if it is still there after the grace, it is
    ended with REQUEUE. A second SIGINT ends it at once, with INTERRUPTED. Rank 0 says so in one line.
    """

    def __init__(self) -> None:
        global _active
        self.started = float(os.environ.get(STARTED, time.monotonic()))
        self._phase: Literal["start", "unwinding", "training"] = "start"
        self._grace, self._time_limit = 0.0, float("inf")
        self._receiver: Callable[[int], None] | None = None
        self._requested: str | None = None
        self._saved = False
        self._noticed: int | None = None  # the signal that the main thread unwinds for
        self._first_interrupt: float | None = None
        self._end: tuple[float, str, int] | None = None  # when, with which line and exit code
        self._unsaid = threading.Semaphore()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._in_main_thread) for number in SIGNALS}
        _active = self
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # train.ranks starts a rank with them blocked

    @property
    def requested(self) -> str | None:
        """Why training should end at the next step: the name of a signal or "time limit"; else None."""
        limit_passed = time.monotonic() - self.started >= self._time_limit
        if self._requested is None and self._phase == "training" and limit_passed:
            self._requested = "time limit"
        return self._requested

    def training(self, grace: float, time_limit: float | None) -> None:
        """From now on there is something to save.

        grace: seconds from a signal to the end at the latest. time_limit: minutes since the run was started.
        """
        self._grace = grace
        self._time_limit = float("inf") if time_limit is None else time_limit * 60
        self._phase = "training"

    def saved(self) -> None:
        """All is saved: what is still to be done is not worth a warning."""
        self._saved = True

    @contextmanager
    def unwinding(self) -> Iterator[None]:
        """A block of the start that a signal unwinds before the process ends: what is half made goes."""
        self._phase = "unwinding"
        try:
            yield
        finally:
            if self._noticed is not None:
                self._exit(*_unsaved(self._noticed))
        self._phase = "start"

    @contextmanager
    def passing_on(self, receiver: Callable[[int], None]) -> Iterator[None]:
        """A block in which `receiver` is called with a signal's number, in a thread; nothing else happens."""
        self._receiver = receiver
        try:
            yield
        finally:
            self._receiver = None

    def done(self) -> None:
        """Give the signals back to whoever had them; nothing limits this process any more."""
        global _active
        _active = None
        self._restore()
        self._writer.shutdown(socket.SHUT_RDWR)  # even where a forked process holds it too
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self._receiver is None and self._phase == "training":
            self._request(number)
        if self._receiver is None and self._phase == "unwinding" and self._noticed is None:
            self._noticed = number
            line, code = _unsaved(number)
            self._end = time.monotonic() + UNWOUND, line, code
            self._say(line)
            raise SystemExit(code)

    def _listen(self) -> None:
        """The thread: act on each signal, and end the process when its time is over."""
        while True:
            self._reader.settimeout(None if self._end is None else max(1e-3, self._end[0] - time.monotonic()))
            try:
                received = self._reader.recv(64)
            except TimeoutError:
                self._time_is_over()
                continue
            if not received:
                return
            for number in received:
                if number in SIGNALS:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._receiver is not None:
            return self._receiver(number)
        if number == signal.SIGINT:
            self._first_interrupt = self._first_interrupt or now
            if now - self._first_interrupt >= APART:
                self._exit("interrupted", INTERRUPTED)
        if self._phase == "start" and self._end is None:
            self._exit(*_unsaved(number))
        if self._phase == "training":
            self._request(number)
            line = f"no save within the grace of {self._grace:g} s (stop.grace); the last checkpoint stays"
            end = now + self._grace, f"{signal.Signals(number).name}: {line}", REQUEUE
        else:
            end = now + STUCK, *_unsaved(number)
        self._end = self._end or end

    def _time_is_over(self) -> None:
        assert self._end is not None
        at, line, code = self._end
        if self._saved:
            line = f"saved; what was left to do took longer than the grace of {self._grace:g} s (stop.grace)"
        if time.monotonic() >= at:  # else the main thread has noticed, and was given more time
            self._exit(line, code)

    def _request(self, number: int) -> None:
        self._requested = self._requested or signal.Signals(number).name

    def _exit(self, line: str, code: int) -> None:
        self._say(line)
        os._exit(code)

    def _say(self, line: str) -> None:
        """Once, on rank 0's stderr, whatever a thread is just writing there."""
        if self._unsaid.acquire(blocking=False) and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, f"{line}\n".encode())


_active: Stop | None = None


def install() -> Stop:
    """The Stop of this process, for as long as it lives; made by the first call, in the main thread."""
    return _active or Stop()


@contextmanager
def current() -> Iterator[Stop]:
    """The Stop of this process; where there is none yet, one for the block alone."""
    if _active is not None:
        yield _active
        return
    stop = Stop()
    try:
        yield stop
    finally:
        stop.done()


def _unsaved(number: int) -> tuple[str, int]:
    """The last line and the exit code of a process that a signal ends when it has nothing to save."""
    if number == signal.SIGINT:
        return "interrupted", INTERRUPTED
    return f"{signal.Signals(number).name}: stopped before the first step; nothing to save", REQUEUE


# A forked process has its own signals. One that it got while it still shared the socket and the handlers
# would reach this process too, so they wait for as long as a fork takes.
_masks = threading.local()


def _before_fork() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _in_forked() -> None:
    global _active
    if _active is not None:
        _active._restore()
        _active = None
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked)
