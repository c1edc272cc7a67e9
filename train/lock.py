"""One run, one directory: a lock that a killed process does not leave behind, on network file systems too.

The kernel's lock on the file (flock) is the truth on one host. Some network file systems keep it to each
host (NFS with local_lock, Lustre with localflock); there the file's one line of JSON tells who holds it, and
its beat, a number that the holder moves on, whether that process still lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

INTERVAL = 5.0  # seconds between two beats
WATCHED = 3  # intervals in which the entry of a process that lives on another host must have moved


class Lock:
    """Held from here on: until released, let go of or, with processes that inherit it, the last has ended.

    It may wait for WATCHED intervals, saying so, where another host left its entry.

    Raises:
        ValueError: the directory cannot be written, another process holds it, or it cannot be locked.
    """

    def __init__(self, directory: Path) -> None:
        own = {"host": platform.node(), "boot": _boot(), "pid": os.getpid(), "start": time.time(), "beat": 0}
        self._descriptor = _locked(directory)
        try:
            _settle(directory)
            _write(self._descriptor, own)
        except OSError as error:
            os.close(self._descriptor)
            raise _unwritable(directory, error) from None
        except BaseException:
            os.close(self._descriptor)
            raise
        stop = threading.Event()
        # The thread must not hold this object, with which the lock goes.
        arguments = (directory, self._descriptor, own, stop)
        thread = threading.Thread(target=_keep, args=arguments, name="lock", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, stop, thread)

    def fileno(self) -> int:
        """The descriptor, for child processes to inherit: the lock holds until the last that has it ends."""
        return self._descriptor

    def release(self) -> None:
        """Let others have it, and say on the file that this process ended properly."""
        self._end()


def _locked(directory: Path) -> int:
    """A descriptor of the directory's lock file, which the kernel has locked."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unwritable(directory, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _refusal(directory, _parse(_text(directory))) from None
        except OSError as error:
            os.close(descriptor)
            if not _text(directory):
                (directory / "lock").unlink(missing_ok=True)
            raise ValueError(
                f"directory: the file system of {directory} cannot lock files ({error.strerror}), so two runs"
                " could write there at once; choose a directory on another"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory / "lock")):
                return descriptor
        os.close(descriptor)  # the file was taken away while we opened it: what we locked is none


def _settle(directory: Path) -> None:
    """Find out whether the holder that the file names, if of another host, still lives.

    Raises ValueError where it does. No clocks are compared: what counts is whether the entry moves.
    """
    before = _text(directory)
    entry = _parse(before)
    if not before or (entry.get("host"), entry.get("boot")) == (platform.node(), _boot()):
        return
    host = entry.get("host", "another host")
    print(f"waiting to see whether {host} still trains in {directory}", flush=True)
    for _ in range(WATCHED):
        time.sleep(INTERVAL)
        now = _text(directory)
        if not now:
            return
        if now != before:
            raise _refusal(directory, _parse(now) or entry)
    print(f"took over the lock that {host} (pid {entry.get('pid', 'unknown')}) left", flush=True)


def _keep(directory: Path, descriptor: int, own: dict[str, Any], stop: threading.Event) -> None:
    """Move the beat on until told to stop; then empty the entry and give the lock back."""
    while not stop.wait(INTERVAL):
        found = _parse(_text(directory))
        if found and any(found.get(key) != own[key] for key in ("host", "boot", "pid", "start")):
            # This process stood still for so long that another took it for dead. Two must not write here.
            who = f"pid {found.get('pid')} on {found.get('host')}"
            print(
                f"error: directory: {who} took over {directory}; this process ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        own["beat"] += 1
        with suppress(OSError):  # the next beat may succeed
            _write(descriptor, own)
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()


def _write(descriptor: int, entry: dict[str, Any]) -> None:
    """Replace the entry. Whoever reads meanwhile finds a whole line, but perhaps more after it."""
    line = json.dumps(entry).encode() + b"\n"
    os.pwrite(descriptor, line, 0)
    os.ftruncate(descriptor, len(line))
    os.fsync(descriptor)


def _text(directory: Path) -> str:
    """The entry as it stands; "" where there is none. Opened anew, for NFS looks at the server only then."""
    try:
        return (directory / "lock").read_text(errors="replace").partition("\n")[0]
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any]:
    """The entry's fields; none where it was half written."""
    try:
        entry = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _unwritable(directory: Path, error: OSError) -> ValueError:
    return ValueError(f"directory: cannot write to {directory} ({error.strerror}); choose another")


def _refusal(directory: Path, entry: dict[str, Any]) -> ValueError:
    who = f" (pid {entry.get('pid')} on {entry.get('host')})" if entry else ""
    return ValueError(
        f"directory: another process trains in {directory}; wait for it{who}, or choose another name=…"
    )


def _boot() -> str:
    """What tells machines of the same name apart: containers often share one. Empty where not on Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
