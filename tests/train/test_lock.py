"""The lock of a run's directory: against processes of this host (flock) and of others (its entry)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import ROOT
from train import lock
from train.lock import Lock

HOLD = """
import sys
from pathlib import Path
from train import lock
lock.INTERVAL = 0.05
held = lock.Lock(Path(sys.argv[1]))
print("held", flush=True)
command = sys.stdin.readline()
if command == "release\\n":
    held.release()
    print("released", flush=True)
    sys.stdin.read()
elif command == "hand on\\n":
    import subprocess
    child = subprocess.Popen(["sleep", "60"], pass_fds=[held.fileno()], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""
ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid": 7, "start": 1.0, "beat": 3}


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "INTERVAL", 0.05)


@contextlib.contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the directory and does what it is then told."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory], cwd=ROOT, text=True, **pipes)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], command: str) -> str:
    assert process.stdin and process.stdout
    process.stdin.write(command + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def entry(directory: Path) -> dict:
    return json.loads((directory / "lock").read_text())


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        with pytest.raises(ValueError) as refused:
            Lock(tmp_path)
        who = f"(pid {first.pid} on {platform.node()})"
        assert str(refused.value) == (
            f"directory: another process trains in {tmp_path}; wait for it {who}, or choose another name=…"
        )
        beat, deadline = entry(tmp_path)["beat"], time.monotonic() + 10
        while entry(tmp_path)["beat"] == beat:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_a_killed_process_held_is_taken_over_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        assert entry(tmp_path)["pid"] == first.pid
        monkeypatch.setattr(lock, "INTERVAL", 60)
        held = Lock(tmp_path)
        assert entry(tmp_path)["pid"] == os.getpid()
        held.release()
    assert capfd.readouterr().out == ""


def test_it_holds_until_the_last_process_that_was_handed_it_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        child = int(tell(first, "hand on"))
        try:
            first.kill()
            first.wait()
            with pytest.raises(ValueError, match="another process trains"):
                Lock(tmp_path)
        finally:
            os.kill(child, 9)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{child}/fd/1").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        Lock(tmp_path).release()


def test_a_proper_end_empties_the_entry(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        assert tell(first, "release") == "released"
        assert (tmp_path / "lock").read_text() == ""
        held = Lock(tmp_path)  # while the other still runs
        del held  # the lock goes with it
        gc.collect()
        assert (tmp_path / "lock").read_text() == ""
    with holder(tmp_path) as second:
        tell(second, "")  # Python ends
        second.wait()
        assert (tmp_path / "lock").read_text() == ""


def test_a_process_of_another_host_that_lives_is_not_disturbed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "INTERVAL", 0.5)
    path, stop = tmp_path / "lock", threading.Event()
    path.write_text(json.dumps(ELSEWHERE) + "\n")

    def beats() -> None:
        number = 3
        while not stop.wait(0.05):
            number += 1
            with open(path, "r+") as file:
                file.write(json.dumps(ELSEWHERE | {"beat": number}) + "\n")

    other = threading.Thread(target=beats)
    other.start()
    try:
        with pytest.raises(ValueError, match=r"another process .*; wait for it \(pid 7 on elsewhere\)"):
            Lock(tmp_path)
    finally:
        stop.set()
        other.join()
    assert capfd.readouterr().out == f"waiting to see whether elsewhere still trains in {tmp_path}\n"
    assert entry(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize("name", ["elsewhere", platform.node()])
def test_what_a_dead_process_of_another_machine_left_is_taken_over(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lock").write_text(json.dumps(ELSEWHERE | {"host": name}) + "\n" + "rest of a longer entry")
    start = time.monotonic()
    held = Lock(tmp_path)
    assert time.monotonic() - start >= lock.WATCHED * lock.INTERVAL
    assert entry(tmp_path)["pid"] == os.getpid()
    held.release()
    waiting, took = capfd.readouterr().out.splitlines()
    assert waiting == f"waiting to see whether {name} still trains in {tmp_path}"
    assert took == f"took over the lock that {name} (pid 7) left"


def test_one_who_was_taken_for_dead_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        (tmp_path / "lock").write_text(json.dumps(ELSEWHERE) + "\n")
        assert first.wait(10) == 1
        assert first.stderr
        message = f"error: directory: pid 7 on elsewhere took over {tmp_path}; this process ends\n"
        assert first.stderr.read() == message
    assert entry(tmp_path) == ELSEWHERE


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError) as refused:
        Lock(tmp_path)
    assert str(refused.value) == (
        f"directory: the file system of {tmp_path} cannot lock files ({os.strerror(number)}), so two runs"
        " could write there at once; choose a directory on another"
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_taken_away_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        times.append(1)
        if len(times) == 1:
            (tmp_path / "lock").unlink()  # by a beginning that failed, whose lock we waited for

    monkeypatch.setattr(fcntl, "flock", flock)
    held = Lock(tmp_path)
    assert len(times) == 2 and entry(tmp_path)["pid"] == os.getpid()
    held.release()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ValueError, match=r"^directory: cannot write to .* \(No space left on device\);"):
            Lock(tmp_path)
    Lock(tmp_path).release()
