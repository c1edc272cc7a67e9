"""The launcher of the ranks: real processes, most of them without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny import ROOT
from train.ranks import lost_peer
from train.stop import INTERRUPTED, REQUEUE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# A rank writes its process id, and each signal that it gets; then it does what its own line says.
RANK = """
import os, signal, sys, time
from pathlib import Path
from train.stop import SIGNALS
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
got = []

def note(number, frame):
    got.append(signal.Signals(number).name)
    (folder / f"signals-{rank}").write_text(" ".join(got))

for number in SIGNALS:
    signal.signal(number, note)
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
(folder / f"pid-{rank}.partial").write_text(str(os.getpid()))
(folder / f"pid-{rank}.partial").rename(folder / f"pid-{rank}")

def wait(*names):
    while not set(names) <= set(got):
        time.sleep(0.01)

def end_after(other):
    while not (folder / f"pid-{other}").exists():
        time.sleep(0.01)
    sys.exit(75)

def sleep():
    while True:
        time.sleep(1)

eval(sys.argv[2 + rank])
"""
LAUNCHER = """
import os, sys
from train import ranks
from train.stop import install
install()
ranks.LAST_WORDS = ranks.SECOND_INTERRUPT = 0.3
ranks.MARGIN = float(sys.argv.pop(1))
environments = [{**os.environ, "RANK": str(rank)} for rank in range(len(sys.argv) - 3)]
command = [sys.executable, "-c", *sys.argv[1:]]
ranks.end_with(lambda: sys.exit(ranks.supervise(command, environments, [], 0.2)))
"""


@contextmanager
def launched(
    folder: Path, *ranks: str, code: str = RANK, margin: float = 0.3
) -> Iterator[subprocess.Popen[str]]:
    """A launcher, in a session of its own as a shell's job is, whose ranks are all there."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(margin), code, str(folder), *ranks],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(list(folder.glob("pid-?"))) == len(ranks))
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate()
        wait_for(lambda: not any(alive(pid) for pid in pids(folder)))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid-?"))]


def signals(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("signals-?"))]


def alive(pid: int) -> bool:
    """Whether a process is there, and not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pending(pid: int) -> int:
    """The signals that wait for a process, as bits."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))


def end(launcher: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    _, err = launcher.communicate(timeout=20)
    return launcher.returncode, err


def test_ranks_that_finish(tmp_path: Path) -> None:
    with launched(tmp_path, "sys.exit(0)", "time.sleep(0.1)") as launcher:
        assert end(launcher) == (0, "")


def test_signals_are_passed_on_once_each(tmp_path: Path) -> None:
    own = "(wait('SIGTERM', 'SIGUSR1'), time.sleep(0.1), sys.exit(75))"
    with launched(tmp_path, own, own) as launcher:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            launcher.send_signal(number)
            wait_for(lambda: len(signals(tmp_path)) == 2)
        assert end(launcher) == (REQUEUE, "")
    assert signals(tmp_path) == ["SIGTERM SIGUSR1"] * 2


def test_an_interrupt_at_the_terminal_reaches_each_rank_once(tmp_path: Path) -> None:
    own = "(wait('SIGINT'), time.sleep(0.1), sys.exit(75))"
    with launched(tmp_path, own, own) as launcher:
        os.killpg(launcher.pid, signal.SIGINT)
        assert end(launcher) == (REQUEUE, "")
    assert signals(tmp_path) == ["SIGINT", "SIGINT"]


def test_a_second_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep()", "sleep()", margin=60) as launcher:
        for pause in (0.1, 0.6):  # the first two are one Ctrl-C, delivered twice
            os.killpg(launcher.pid, signal.SIGINT)
            time.sleep(pause)
        assert launcher.poll() is None
        assert signals(tmp_path) == ["SIGINT", "SIGINT"]
        os.killpg(launcher.pid, signal.SIGINT)
        assert end(launcher) == (INTERRUPTED, "")
        assert not any(map(alive, pids(tmp_path)))
    assert signals(tmp_path) == ["SIGINT SIGINT"] * 2


SLOW = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], "pid-0").write_text(str(os.getpid()))
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.01)
from train.stop import install
install()
time.sleep(60)
"""


def test_a_signal_waits_until_a_new_rank_can_take_it(tmp_path: Path) -> None:
    with launched(tmp_path, "", code=SLOW, margin=60) as launcher:
        rank = pids(tmp_path)[0]
        launcher.send_signal(signal.SIGTERM)
        wait_for(lambda: pending(rank) == 1 << (signal.SIGTERM - 1))
        (tmp_path / "go").touch()
        assert end(launcher) == (REQUEUE, "SIGTERM: stopped before the first step; nothing to save\n")


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep()", "sleep()") as launcher:
        os.kill(pids(tmp_path)[1], signal.SIGKILL)
        assert end(launcher) == (1, "rank 1 was killed by SIGKILL\n")
        assert not any(map(alive, pids(tmp_path)))
    assert signals(tmp_path) == []


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep()", "sys.exit(3)") as launcher:
        assert end(launcher) == (1, "rank 1 ended with exit code 3\n")
        assert not any(map(alive, pids(tmp_path)))


def test_no_rank_outlives_its_launcher(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep()", "sleep()") as launcher:
        launcher.kill()
        wait_for(lambda: not any(map(alive, pids(tmp_path))))


def test_a_rank_that_stops_takes_the_others_along(tmp_path: Path) -> None:
    with launched(tmp_path, "end_after(1)", "(wait('SIGTERM'), sys.exit(75))") as launcher:
        assert end(launcher) == (REQUEUE, "")


def test_a_rank_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path, "end_after(1)", "sleep()") as launcher:
        assert end(launcher) == (REQUEUE, "")
        assert not any(map(alive, pids(tmp_path)))
    assert signals(tmp_path) == ["SIGTERM"]


# Two ranks meet at the launcher's store; one leaves, and the other waits for it in C++.
MEET = """
import os, sys, torch
import torch.distributed as dist
from train.ranks import end_with, lost_in_one_line
from train.stop import install
install()

@lost_in_one_line()
def main():
    dist.init_process_group("gloo")
    one = torch.ones(1)
    dist.all_reduce(one)
    if dist.get_rank() == 1:
        os._exit(int(one))
    dist.all_reduce(one)

end_with(main)
"""
START = """
import os, sys
from train.ranks import end_with, start
from train.stop import install
install()
end_with(lambda: sys.exit(start([sys.executable, "-c", sys.argv[1]], 2, dict(os.environ), [], 1.0)))
"""


def test_a_rank_says_in_one_line_that_it_lost_another() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START, MEET], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    lost, ended = sorted(done.stderr.splitlines())
    assert lost.startswith("rank 0: lost another rank (Connection ")
    assert ended == "rank 1 ended with exit code 2"


def test_only_another_ranks_end_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_peer(closed) == "Connection closed by peer"
    wrapped = RuntimeError("rank 0 failed")
    wrapped.__cause__ = closed
    assert lost_peer(wrapped) == "Connection closed by peer"
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_peer(BrokenPipeError("Broken pipe")) is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert lost_peer(closed) is None
