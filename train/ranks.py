"""Start the ranks of a run on this machine, pass signals on to them, and make one exit code of theirs."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NoReturn

from train.stop import APART, INTERRUPTED, REQUEUE, SIGNALS, current

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 10.0  # seconds beyond the grace, after which a rank that has not ended itself is killed
LAST_WORDS = 5.0  # seconds for the other ranks to say what they have to say when one has failed
LOST_ANOTHER = 76  # exit code of a rank that ends because another has: EX_PROTOCOL of sysexits.h
SECOND_INTERRUPT = 2.0  # seconds for the ranks to end after a second SIGINT
LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Connection was likely closed|got 0 bytes"
    r"|remote process exit(ed|ing prematurely)"
)

# What a launcher's thread or a rank's end tells the launcher: (None, signal) or (rank, exit code).
Event = tuple[int | None, int]


def start(
    command: Sequence[str],
    ranks: int,
    environment: dict[str, str],
    pass_fds: Sequence[int],
    grace: float,
) -> int:
    """Run `command` as each of `ranks` ranks, and return the exit code of the whole.

    It is 0 where every rank ended with 0; REQUEUE where they were stopped; INTERRUPTED on a second SIGINT; 1
    where a rank failed, which one line on stderr tells. This process hosts the store where they meet.
    grace: seconds from a signal until a rank ends by itself.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 need not host one
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return supervise(command, [{**environment, **shared, **more} for more in own], pass_fds, grace)


def supervise(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    pass_fds: Sequence[int],
    grace: float,
) -> int:
    """`start`, given the whole environment of each rank."""
    events: SimpleQueue[Event] = SimpleQueue()
    processes: list[subprocess.Popen[bytes]] = []
    with current() as stop, stop.passing_on(lambda number: events.put((None, number))):
        try:
            for rank, environment in enumerate(environments):
                process = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=ROOT,
                    pass_fds=pass_fds,
                    start_new_session=True,  # a terminal's Ctrl-C reaches it through us alone
                    preexec_fn=bound_to(os.getpid()),
                )
                processes.append(process)
                threading.Thread(target=_report, args=(rank, process, events), daemon=True).start()
            return _Ranks(processes, grace).outcome(events)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def say(line: str) -> None:
    """A line on stderr, whole: launcher and ranks write there at the same time."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def bound_to(launcher: int) -> Callable[[], None]:
    """What a rank's process does before it runs its command: on Linux, bind its life to the launcher's.

    The signals are blocked, and wait, until it has made its Stop.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if library is not None:
            set_parent_death_signal = 1
            library.prctl(set_parent_death_signal, signal.SIGKILL)
            if os.getppid() != launcher:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    return prepare


def _report(rank: int, process: subprocess.Popen[bytes], events: SimpleQueue[Event]) -> None:
    events.put((rank, process.wait()))


class _Ranks:
    """The live ranks, what they were sent, and when those that are left are killed."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], grace: float) -> None:
        self.live, self.patience = dict(enumerate(processes)), grace + MARGIN
        self.sent: dict[int, float] = {}  # signals by the time of the first
        self.code = 0
        self.lost = False  # a rank has ended because of another
        self.kill_at: float | None = None

    def outcome(self, events: SimpleQueue[Event]) -> int:
        while self.live:
            try:
                rank, value = events.get(
                    timeout=None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())
                )
            except Empty:
                self._send(signal.SIGKILL)
                self.code, self.kill_at = self.code or (1 if self.lost else REQUEUE), None
                continue
            if rank is None:
                self._pass_on(value)
            else:
                del self.live[rank]
                self._ended(rank, value)
        return self.code or int(self.lost)

    def _pass_on(self, number: int) -> None:
        """A signal to the launcher: each kind once, but for a second SIGINT."""
        now = time.monotonic()
        again = number == signal.SIGINT and now - self.sent.get(number, now) >= APART
        if number in self.sent and not again:
            return
        self.sent.setdefault(number, now)
        self._send(number)
        self._kill_in(SECOND_INTERRUPT if again else self.patience)
        if again:
            self.code = INTERRUPTED

    def _ended(self, rank: int, code: int) -> None:
        if code == 0 or self.code:
            return
        if code == LOST_ANOTHER:  # and has said so; the other may be seen later
            self._kill_in(LAST_WORDS)
            self.lost = True
            return
        if code == REQUEUE:
            self.code = REQUEUE
            if not self.sent:
                self._send(signal.SIGTERM)
            self._kill_in(self.patience)
            return
        self._kill_in(LAST_WORDS)  # without it the others cannot save
        self.code = INTERRUPTED if code == INTERRUPTED else 1
        if code < 0:
            say(f"rank {rank} was killed by {signal.Signals(-code).name}")
        elif code != INTERRUPTED:
            say(f"rank {rank} ended with exit code {code}")

    def _send(self, number: int) -> None:
        for process in self.live.values():
            process.send_signal(number)

    def _kill_in(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self.kill_at = at if self.kill_at is None else min(at, self.kill_at)


def end_with(main: Callable[[], None]) -> NoReturn:
    """Run the main function of a run's process, and end the process with its exit code; never returns.

    It ends without Python's own end, in which threads of libtorch may still let go of its objects: they are
    then killed in mid-call, and once in a great many times the process aborts ("terminate called without an
    active exception").
    """
    code: object = 0
    try:
        main()
    except SystemExit as left:
        code = left.code
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    if isinstance(code, str):
        say(code)
    with suppress(OSError):  # a full disk behind it, or nobody
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def end_torchrun() -> None:
    """Where torchrun started this rank, have it end too: it would start ranks anew that are to stay ended."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)


@contextmanager
def lost_in_one_line() -> Iterator[None]:
    """A block in which an error that is only another rank's end becomes a SystemExit of one line."""
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_peer(error)) is None:
            raise
        say(f"rank {os.environ['RANK']}: lost another rank ({lost})")
        sys.exit(LOST_ANOTHER)


def lost_peer(error: BaseException | None) -> str | None:
    """What of an error, or of one that led to it, says that another rank has ended; None: it is our own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    while error is not None:
        found = LOST.search(str(error)) if isinstance(error, RuntimeError) else None
        if found:
            return found[0]
        error = error.__cause__ or error.__context__
    return None
