"""A rank that hangs is named, with its stack, instead of a silent time-out of hours in all the others.

Every rank marks what it comes to; all make the same sequence of marks. A thread of each rank tells the
others its latest mark through the store where the ranks met. Everybody waits for the rank with the fewest
marks: when its last one is too old, or when it is silent, all ranks tell where they stand, one of them
reports, and all end with exit code 1.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.engine import World

OWN_THREADS = ("watchdog", "watchdog store", "stop", "lock")  # which hold nobody up
# Seconds beyond what it should take that another rank or the store is given to answer. A name server that
# does not answer holds up a store for 5 at each new connection.
SLACK = 10.0
LINGER = 0.5  # seconds from the report to the end of all ranks at once: with one of them the store may go
POLL = 0.1  # seconds between two questions to the store
MENTIONED = 4  # processes of ranks that are at the same place
LAST = 3  # of the innermost frames, one in a collective says that a rank waits for the others
RESTORE = "restore"  # the phase of a rank that reads a checkpoint, of any size and from any disk
ALARM, CLAIM, DONE = "alarm", "claim", "done"


def to_stderr(text: str) -> None:
    """Past Python's own buffer, whose lock the main thread may hold."""
    os.write(2, (text + "\n").encode())


@dataclass(frozen=True)
class State:
    """What a rank tells of itself.

    marks: how many it has made. age: seconds since the last. ticks: of its watch thread; -1 once the watchdog
    is closed. The rest it tells after an alarm. stack, others: of its main thread, of its other threads.
    waits: whether in a collective.
    """

    rank: int
    process: str
    marks: int
    step: int
    phase: str
    age: float
    ticks: int
    stack: str = ""
    others: str = ""
    waits: bool = False


class Watchdog:
    """Watches this rank, with those of the others, until it is closed.

    Args:
        timeout: seconds without a mark, after which a rank hangs.
        folder: of the run; the report goes to hang.txt in it, too.
        say: where else.
    """

    def __init__(
        self, world: World, timeout: float, folder: Path, say: Callable[[str], None] = to_stderr
    ) -> None:
        self.rank, self.size = world.rank, world.size
        self.timeout, self.folder, self.say = timeout, folder, say
        self._lost = 0.0  # seconds in which not even the watch thread ran: they do not count
        self._tick = min(timeout / 10, 5.0)
        self._ticks = 0
        self._seen: dict[int, tuple[int, float]] = {}
        # Several starts of a rank's processes share a store, and each node counts its own.
        self._board = _Board(world.broadcast(f"{time.time_ns()}")) if world.size > 1 else None
        self._process = f"pid {os.getpid()} on {platform.node()}"
        self._closed = threading.Event()
        self._mark = (0, 0, "start", self._now())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, step: int, phase: str) -> None:
        """Say what the main thread comes to, all ranks the same; costs less than a microsecond.

        phase: RESTORE lasts as long as it takes.
        """
        self._mark = (self._mark[0] + 1, step, phase, time.monotonic() - self._lost)

    def close(self) -> None:
        """Stop watching, and let the other ranks know."""
        self._closed.set()
        self._thread.join(2 * SLACK)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            self._ticks += 1
            # Where code holds Python's own lock, no thread comes here again, and this prints the stacks. It
            # must not end the process: it also fires in one that was suspended, as it goes on.
            faulthandler.dump_traceback_later(self.timeout / 2, file=2)
            if self._hangs():
                self._end()
            before = time.monotonic()
            if self._closed.wait(self._tick):
                break
            late = time.monotonic() - before - self._tick
            if late > self._tick:  # the process was suspended, or the machine stood still
                self._lost += late
        with suppress(RuntimeError, TimeoutError):
            if self._board:
                self._board.tell(replace(self._state(), ticks=-1))

    def _state(self) -> State:
        marks, step, phase, at = self._mark
        return State(self.rank, self._process, marks, step, phase, self._now() - at, self._ticks)

    def _now(self) -> float:
        return time.monotonic() - self._lost

    def _hangs(self) -> bool:
        """Whether some rank does; tells the others the state of this one."""
        own = self._state()
        if self._board is None:
            return own.age > self.timeout and own.phase != RESTORE
        try:
            self._board.tell(own)
            if self._board.has(ALARM):
                return True
            if own.age < self.timeout / 2 or own.phase == RESTORE:
                return False
            states = self._board.read("state", range(self.size))
        except (RuntimeError, TimeoutError):
            return own.age > self.timeout and own.phase != RESTORE
        silent = {state.rank for state in states if self._is_silent(state)}
        fewest = min(state.marks for state in states if state.ticks >= 0)
        slowest = [state for state in states if state.ticks >= 0 and state.marks == fewest]
        return own.age > self.timeout and all(s.age > self.timeout or s.rank in silent for s in slowest)

    def _is_silent(self, state: State) -> bool:
        """Whether its ticks have stood still since we first looked."""
        now = time.monotonic()
        ticks, at = self._seen.get(state.rank, (None, now))
        if ticks != state.ticks:
            self._seen[state.rank] = (state.ticks, now)
        return ticks == state.ticks and now - at > 3 * self._tick + SLACK

    def _end(self) -> None:
        """Report, once among the ranks, and end the process."""
        faulthandler.cancel_dump_traceback_later()
        gather = self._tick + SLACK
        last = threading.Timer(gather + 4 * SLACK, os._exit, (1,))  # whatever still blocks
        last.daemon, last.name = True, OWN_THREADS[0]
        last.start()
        own = _with_stacks(self._state())
        if self._board is None:
            self._report([own], [own])
        else:
            try:
                self._report_once(self._board, own, gather)
            except (RuntimeError, TimeoutError):
                store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                head = f"rank {self.rank} waits or hangs, and the ranks' store at {store} does not answer"
                self._report([own], [own], head)
        os._exit(1)

    def _report_once(self, board: _Board, own: State, gather: float) -> None:
        ranks = range(self.size)
        board.tell(own, "answer")
        board.set(ALARM, "")
        # Rank 0 gathers, and where it cannot, the first that has waited for it in vain.
        patience = 0.0 if self.rank == 0 else gather + SLACK
        if board.await_all([DONE], patience) or not board.claim():
            board.await_all([DONE], gather + SLACK)
            time.sleep(LINGER - POLL)
            return
        states = board.read("state", ranks)
        open_ranks = [state.rank for state in states if state.ticks >= 0]
        board.await_all([f"answer/{rank}" for rank in open_ranks], gather if self.rank == 0 else 0.0)
        answers = {state.rank: state for state in board.read("answer", ranks)}
        states = [answers.get(state.rank, state) for state in states]
        known = {state.rank for state in states}
        states += [
            State(rank, "not yet training", 0, 0, "start", 0.0, 0) for rank in ranks if rank not in known
        ]
        self._report(states, who_hangs(states))
        board.set(DONE, "")
        time.sleep(LINGER)

    def _report(self, states: list[State], hanging: list[State], head: str | None = None) -> None:
        text = report(states, hanging, self.timeout, head)
        self.say(text)
        with suppress(OSError), open(self.folder / "hang.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n\n")


def who_hangs(states: Iterable[State]) -> list[State]:
    """Those for whom the others wait; none where all wait in collectives."""
    running = [state for state in states if state.ticks >= 0]
    silent = [state for state in running if not state.stack]
    if silent:
        return silent
    fewest = min(state.marks for state in running)
    slowest = [state for state in running if state.marks == fewest]
    if len(slowest) < len(running):
        return slowest
    return [state for state in slowest if not state.waits]


def report(states: list[State], hanging: list[State], timeout: float, head: str | None = None) -> str:
    """What a person reads: who hangs, where, and where the others are. head: instead of who hangs."""
    if head is None and hanging:
        head = f"{_names(s.rank for s in hanging)} hang{'s' if len(hanging) == 1 else ''}"
    head = head or "all ranks wait for each other in collectives"
    lines = [f"no progress for {timeout:g} s: {head}. All ranks end now; the same command goes on"]
    shown = hanging or [state for state in states if state.ticks >= 0]
    for (mark, stack, others), own in _grouped(shown, lambda s: (_place(s), s.stack, s.others)):
        if stack:
            lines += [f"{_who(own)}, {mark}:", stack.rstrip("\n"), *([others.rstrip("\n")] if others else [])]
        else:
            lines.append(f"{_who(own)} does not answer; last mark: {mark}")
    rest = [state for state in states if state not in shown]
    for (mark, where), own in _grouped(rest, lambda s: (_place(s), _innermost(s))):
        lines.append(f"{_names(s.rank for s in own)}: {mark}, {where}")
    return "\n".join(lines)


def _grouped(
    states: Iterable[State], key: Callable[[State], tuple[str, ...]]
) -> Iterable[tuple[tuple[str, ...], list[State]]]:
    groups: dict[tuple[str, ...], list[State]] = defaultdict(list)
    for state in states:
        groups[key(state)].append(state)
    return groups.items()


def _place(state: State) -> str:
    return f"step {state.step}, {state.phase}"


def _names(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0, 2-7`."""
    ordered = sorted(ranks)
    runs = [list(g) for _, g in itertools.groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(spans)}"


def _who(states: list[State]) -> str:
    processes = [state.process for state in states[:MENTIONED]]
    more = ["…"] if len(states) > MENTIONED else []
    return f"{_names(s.rank for s in states)} ({'; '.join(processes + more)})"


def _innermost(state: State) -> str:
    if state.ticks < 0:
        return "has ended its training"
    frames = [line.strip() for line in state.stack.splitlines() if line.startswith("  File ")]
    if not frames:
        return "does not answer"
    own = [frame for frame in frames if "site-packages" not in frame] or frames
    return f"{'waits for others' if state.waits else 'is'} in {own[-1].removeprefix('File ')}"


def _with_stacks(state: State) -> State:
    """The state with what the threads of this process are at."""
    frames, main = sys._current_frames(), threading.main_thread()
    others = [
        f"  thread {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident])[-LAST:])}"
        for thread in threading.enumerate()
        if thread is not main and thread.name not in OWN_THREADS and thread.ident in frames
    ]
    frame = frames[main.ident]  # type: ignore[index]
    stack = "".join(traceback.format_stack(frame))
    return replace(state, stack=stack, others="".join(others), waits=in_collective(frame))


def in_collective(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks."""
    innermost = itertools.islice(traceback.walk_stack(frame), LAST)
    return any(_is_collective(frame) for frame, _ in innermost)


def _is_collective(frame: FrameType) -> bool:
    path, code = frame.f_code.co_filename.replace(os.sep, "/"), frame.f_code
    if "/torch/distributed/" in path or "/deepspeed/comm/" in path:
        return True
    # Collectives of GPUs and asynchronous ones are waited for elsewhere.
    return code.co_qualname.startswith("World.") or ("/deepspeed/" in path and code.co_name == "wait")


class _Board:
    """The store where the ranks met, through a connection of our own.

    A thread makes the calls: one to a store whose host stands still never returns, whatever its time-out.
    Every method raises RuntimeError or TimeoutError where the store does not answer.
    """

    def __init__(self, name: str) -> None:
        from torch.distributed import PrefixStore, TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self._store = PrefixStore(f"watchdog/{name}", store)
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._last: Future[Any] = Future()
        self._last.set_result(None)
        threading.Thread(target=self._serve, name="watchdog store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def tell(self, state: State, kind: str = "state") -> None:
        self.set(f"{kind}/{state.rank}", json.dumps(asdict(state)))

    def has(self, *keys: str) -> bool:
        return self._ask(lambda: self._store.check(list(keys)))

    def claim(self) -> bool:
        """Whether this is the first rank that asks."""
        return self._ask(lambda: self._store.add(CLAIM, 1)) == 1

    def read(self, kind: str, ranks: Iterable[int]) -> list[State]:
        """What those ranks have told that have told something."""
        keys = [f"{kind}/{rank}" for rank in ranks]
        if not self.has(*keys):
            keys = [key for key in keys if self.has(key)]
        return [State(**json.loads(text)) for text in self._ask(lambda: self._store.multi_get(keys))]

    def await_all(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are there within so many seconds."""
        deadline = time.monotonic() + seconds
        while not (found := self.has(*keys)) and time.monotonic() < deadline:
            time.sleep(POLL)
        return found

    def _ask(self, call: Callable[[], Any]) -> Any:
        """What the call returns; only once the one before it has returned."""
        self._last.exception(SLACK)
        future: Future[Any] = Future()
        self._last = future
        self._calls.put((future, call))
        return future.result(SLACK)

    def _serve(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except RuntimeError as error:
                future.set_exception(error)
