"""Folders that are there whole or not at all, and that one process makes while others wait."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def exclusive(target: Path, complete: Callable[[Path], bool]) -> Iterator[Path | None]:
    """A folder that becomes `target` when the block succeeds; None where target is complete.

    It is empty, or holds what a process had made that was killed, interrupted or left by its disk or network
    in the block. If the block fails otherwise, nothing is left. Other processes wait. The lock lies inside
    the folder, which is hidden until then, so that nothing is left of it afterwards.
    """
    folder = target.parent / f".{target.name}.partial"
    lock = folder / "lock"
    while not complete(target):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("w")
        except FileNotFoundError:
            continue  # its owner has just taken the folder away
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The owner may have finished, or failed and taken the folder away, while we waited.
            if _same_file(lock, file.fileno()) and not complete(target):
                yield from _made(target, folder, lock)
                return
    (target / lock.name).unlink(missing_ok=True)  # of one that was killed at the very end
    yield None


def _made(target: Path, folder: Path, lock: Path) -> Iterator[Path]:
    try:
        yield folder
        if target.exists():  # incomplete: someone deleted part of it
            shutil.rmtree(target)
        folder.rename(target)
        (target / lock.name).unlink()
    except OSError:
        raise
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty: others are in there
            folder.parent.rmdir()
        raise


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
