"""How a process ends on signals and the time limit, each in a small process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny import ROOT
from train.stop import INTERRUPTED, REQUEUE, SIGNALS, Stop, current, install

# The main thread waits in C, without Python's lock, for a mutex that it holds itself: no signal gets it out.
HEAD = """
import ctypes, multiprocessing, os, signal, sys, time
from pathlib import Path
from train.stop import install
stop = install()

def ready():
    print("ready", flush=True)

def block():
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    ready()
    library.pthread_mutex_lock(mutex)
"""
UNSAVED = "{}: stopped before the first step; nothing to save\n"
UNTIL_REQUESTED = """
ready()
while stop.requested is None:
    time.sleep(0.01)
print(stop.requested)
sys.exit(75)
"""


@contextmanager
def process(code: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The code after HEAD in a process that is ready for signals, and is killed in the end."""
    started = subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stdout and started.stdout.readline() == "ready\n"
        yield started
    finally:
        started.kill()
        started.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, further standard output and standard error."""
    assert process.stdout and process.stderr
    return process.wait(timeout=20), process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("waiting", ["block()", "ready(); time.sleep(60)"])
def test_with_nothing_to_save_the_process_ends_at_once(number: int, waiting: str) -> None:
    with process(waiting) as started:
        started.send_signal(number)
        code, _, err = end(started)
    if number == signal.SIGINT:
        assert (code, err) == (INTERRUPTED, "interrupted\n")
    else:
        assert (code, err) == (REQUEUE, UNSAVED.format(signal.Signals(number).name))


def test_of_several_ranks_one_tells() -> None:
    with process("block()", RANK="1") as started:
        started.send_signal(signal.SIGTERM)
        assert end(started) == (REQUEUE, "", "")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGUSR1, REQUEUE, UNSAVED.format("SIGUSR1")), (signal.SIGINT, INTERRUPTED, "interrupted\n")],
)
def test_what_is_half_made_goes_first(tmp_path: Path, number: int, code: int, line: str) -> None:
    half = f"""
half = Path({str(tmp_path)!r}, "half")
with stop.unwinding():
    try:
        half.touch()
        ready()
        time.sleep(60)
    finally:
        time.sleep(0.2)
        half.unlink()
"""
    with process(half) as started:
        started.send_signal(number)
        assert end(started) == (code, "", line)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_unwound_ends_too() -> None:
    with process("import train.stop\ntrain.stop.STUCK = 0.2\nwith stop.unwinding(): block()") as started:
        started.send_signal(signal.SIGTERM)
        assert end(started) == (REQUEUE, "", UNSAVED.format("SIGTERM"))


@pytest.mark.parametrize("number", SIGNALS)
def test_training_is_asked_to_end(number: int) -> None:
    with process("stop.training(30, None)" + UNTIL_REQUESTED) as started:
        started.send_signal(number)
        assert end(started) == (REQUEUE, f"{signal.Signals(number).name}\n", "")


def test_training_that_cannot_end_is_ended_after_the_grace() -> None:
    with process("stop.training(0.5, None); block()") as started:
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        line = "SIGTERM: no save within the grace of 0.5 s (stop.grace); the last checkpoint stays\n"
        assert end(started) == (REQUEUE, "", line)
        assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("waiting", ["block()", "ready(); time.sleep(60)"])
def test_a_second_interrupt_ends_at_once(waiting: str) -> None:
    with process("stop.training(30, None); " + waiting) as started:
        for pause in (0.1, 0.6):  # the first two are one Ctrl-C, delivered twice
            started.send_signal(signal.SIGINT)
            time.sleep(pause)
        assert started.poll() is None
        started.send_signal(signal.SIGINT)
        assert end(started) == (INTERRUPTED, "", "interrupted\n")


def test_the_time_limit_counts_from_the_start_of_the_run() -> None:
    code = "assert stop.requested is None; stop.training(30, 0.5 / 60)" + UNTIL_REQUESTED
    with process(code) as started:
        assert end(started) == (REQUEUE, "time limit\n", "")
    with process(code.replace("0.5 / 60", "60")) as started, pytest.raises(subprocess.TimeoutExpired):
        started.wait(timeout=0.3)
    began_an_hour_ago = str(time.monotonic() - 3600)
    with process(code.replace("0.5 / 60", "60"), ISOFLOP_STARTED=began_an_hour_ago) as started:
        assert end(started) == (REQUEUE, "time limit\n", "")


def test_a_forked_process_has_its_own_signals() -> None:
    forked = """
ready()
for _ in range(50):  # also while it is not yet its own
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,))
    child.start()
    child.terminate()
    child.join()
    assert child.exitcode == -signal.SIGTERM
print("still here")
"""
    with process(forked) as started:
        assert end(started) == (0, "still here\n", "")


def test_signals_that_came_before_it_wait_for_it() -> None:
    blocked = "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, {15}); os.kill(os.getpid(), 15)"
    command = [sys.executable, "-c", f"{blocked}{HEAD}time.sleep(60)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (REQUEUE, UNSAVED.format("SIGTERM"))


def test_it_is_there_before_anything_heavy() -> None:
    code = "import sys, train.stop; print({'torch', 'hydra', 'numpy', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_it_gives_back_what_it_took() -> None:
    def taken() -> tuple[object, ...]:
        descriptors = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
        return threading.active_count(), len(descriptors), *map(signal.getsignal, SIGNALS)

    before = taken()
    for _ in range(3):
        with current() as stop:
            assert install() is stop
            with current() as same:
                assert same is stop
            assert taken() != before
        assert taken() == before
    stop = Stop()
    stop.training(30, None)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested == "SIGUSR1"
    stop.done()
    assert taken() == before


def first_seconds(started: subprocess.Popen[str]) -> None:
    """Until the process handles SIGUSR1: its first bit of Python, long before torch is there."""
    status = Path(f"/proc/{started.pid}/status")
    while started.poll() is None:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1:
            return
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_ends_in_its_first_seconds(number: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [sys.executable, "-m", "train", f"directory={tmp_path}/run"]
    started = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    first_seconds(started)
    began = time.monotonic()
    started.send_signal(number)
    _, err = started.communicate(timeout=20)
    if number == signal.SIGINT:
        assert (started.returncode, err) == (INTERRUPTED, "interrupted\n")
    else:
        assert (started.returncode, err) == (REQUEUE, UNSAVED.format(signal.Signals(number).name))
    assert time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []
