"""A process that is killed at each of its changes to the disk in turn."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

DEADLY = ("mkdir", "link", "fsync", "rename", "replace", "unlink", "rmdir")


def killed_at(call: int, work: Callable[[], Any]) -> bool:
    """Do the work in a process that dies at its `call`-th change to the disk; whether it did."""
    child = os.fork()
    if child == 0:
        left = [call]
        lock = threading.Lock()

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **keywords: Any) -> Any:
                with lock:
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)
                return function(*arguments, **keywords)

            return counted

        for name in DEADLY:
            setattr(os, name, deadly(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9
