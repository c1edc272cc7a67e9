"""Small files that are there whole or not at all, even after a power cut."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replace a file by `text`, whole or not at all, on disk when this returns. Raises OSError.

    A process that is killed meanwhile leaves `.<name>.<process>`.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
