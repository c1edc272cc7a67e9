"""Prepared folders that lie elsewhere: at a file, http, s3, ... address.

A local folder stands in for one. It holds all but the shards, which come through a cache when they are read
(see data.cache), or ahead of that (see data.prefetch).
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from omegaconf import DictConfig

from data.cache import Cache, CachedFile
from data.download import download
from data.exclusive import exclusive
from data.files import write
from data.shards import HEADER, MANIFEST, REMOTE, Shards, map_array, read_manifest

KEYS = ("name", "address", "directory", "cache", "cache_bytes")
UNPLANNED = 2  # shards of a stream that stay in use where nothing is known of its next steps


def fetch(data: DictConfig) -> Path:
    """The local stand-in of the prepared folder at data.address: `<directory>/<last part of the address>`.

    Where it is there already nothing is downloaded, and a folder that has its shards stays as it is. Raises
    ValueError in one line on a wrong key, an address that cannot be read, and a stand-in of other tokens.
    """
    for key in data:
        if key not in KEYS:
            raise ValueError(f"data.{key!s}: unknown key; remote data knows {', '.join(KEYS)}")
    if not isinstance(data.address, str) or not data.address:
        raise ValueError(f"data.address: {data.address!r} is not an address; name that of a prepared folder")
    if not isinstance(data.cache_bytes, int | float) or not data.cache_bytes >= 1:
        raise ValueError(f"data.cache_bytes: {data.cache_bytes!r} is not a number of bytes; set one")
    address = data.address.rstrip("/")
    note = {"address": address, "cache": str(data.cache), "cache_bytes": int(data.cache_bytes)}
    target = Path(data.directory) / address.rpartition("/")[2]
    with exclusive(target, lambda folder: (folder / MANIFEST).is_file()) as folder:
        if folder is not None:
            _fill(folder, address)
            write(folder / REMOTE, json.dumps(note) + "\n")
    _renew(target, note)
    return target


def _fill(folder: Path, address: str) -> None:
    """Bring all but the shards into a folder, where some of it may be already."""
    manifest = _download_manifest(address, folder)
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name, sha256 in manifest["tokenizer"].items():
        download(f"{address}/tokenizer/{name}", folder / "tokenizer" / name, sha256)
    for split in manifest["splits"].values():
        for entry in (split["offsets"], split["document_bytes"]):
            download(f"{address}/{entry['file']}", folder / entry["file"], entry["sha256"])


def _download_manifest(address: str, folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    path.unlink(missing_ok=True)  # of a process that was killed: nothing says whether it is whole
    download(f"{address}/{MANIFEST}", path)
    try:
        manifest = read_manifest(folder)
    except ValueError:
        manifest = {}
    if "splits" not in manifest:
        raise ValueError(f"data.address: {address}/{MANIFEST}: not a manifest; name a prepared folder")
    if "tokenizer" not in manifest or any("parts" not in split for split in manifest["splits"].values()):
        raise ValueError(
            f"data.address: {address}/{MANIFEST}: was prepared by an earlier version; prepare it again"
        )
    return manifest


def _renew(target: Path, note: dict[str, Any]) -> None:
    """Have a stand-in say where the shards lie now."""
    path = target / REMOTE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else note
    if known == note:
        return
    if known["address"] != note["address"]:
        with TemporaryDirectory() as folder:
            there = _download_manifest(note["address"], Path(folder))
        if there["splits"] != read_manifest(target)["splits"]:
            raise ValueError(
                f"data.address: {target} stands in for {known['address']}, which holds other tokens; "
                "delete it, or choose another data.directory"
            )
    write(path, json.dumps(note) + "\n")


class RemoteShards(Shards):
    """The shards of a stream, through the cache where they are not in its folder.

    Those that are mapped stay in the cache: the ones that someone who looks ahead keeps (see data.prefetch),
    and the last UNPLANNED others. kept: the shards of each who looks ahead.
    """

    def __init__(self, folder: Path, entries: Sequence[Mapping[str, Any]], dtype: np.dtype) -> None:
        super().__init__(folder, entries)
        note = json.loads((folder / REMOTE).read_text(encoding="utf-8"))
        self.cache = Cache(Path(note["cache"]).expanduser(), note["cache_bytes"])
        self.files = [
            CachedFile(
                address=f"{note['address']}/{entry['file']}",
                sha256=entry["sha256"],
                size=entry["tokens"] * dtype.itemsize + HEADER,
            )
            for entry in entries
        ]
        self.kept: dict[object, set[int]] = {}
        self._stop = threading.Event()  # set, it ends the downloads of readers
        self._uses: dict[int, int] = {}  # of those that are mapped from the cache: see Cache.hold
        weakref.finalize(self, _close, self._uses)

    def __contains__(self, index: int) -> bool:
        """Whether a shard is mapped."""
        return index in self._maps

    def join(self, planner: object) -> None:
        """Someone more looks ahead, and keeps nothing so far."""
        with self._lock:
            self.kept[planner] = set()
            self._stop.clear()

    def leave(self, planner: object) -> None:
        """Someone looks ahead no longer. With the last, the downloads of readers end."""
        with self._lock:
            self.kept.pop(planner, None)
            if not self.kept:
                self._stop.set()

    def bring(self, index: int, stop: threading.Event) -> bool:
        """Have a shard mapped; False where the cache has no room for it now. Raises as Cache.hold."""
        return index in self or self._take(index, stop, wait=False) is not None

    def keep(self, planner: object, shards: Iterable[int]) -> None:
        """Keep these shards for a planner once they are mapped, and let go of all that nobody keeps."""
        with self._lock:
            self.kept[planner] = set(shards)
            self._let_go(others=0)

    def _map(self, index: int) -> np.ndarray:
        array = self._take(index, self._stop, wait=True)
        assert array is not None
        return array

    def _take(self, index: int, stop: threading.Event, wait: bool) -> np.ndarray | None:
        entry, file = self.entries[index], self.files[index]
        path, use = self.folder / entry["file"], None
        if not path.exists():
            path, use = self.cache.path(file), self.cache.hold(file, stop, wait=False)
            if use is None and not wait:
                return None
            if use is None:
                with self._lock:
                    self._let_go(others=0)
                use = self.cache.hold(file, stop)
        try:
            array = map_array(path, entry["tokens"])
        except BaseException:
            if use is not None:
                os.close(use)
            raise
        with self._lock:
            if index in self._maps:  # by another thread, by now
                if use is not None:
                    self.cache.release(file, use)
                return self._maps[index]
            self._maps[index] = array
            if use is not None:
                self._uses[index] = use
            self._let_go(UNPLANNED)
        return array

    def _let_go(self, others: int) -> None:
        kept = set().union(*self.kept.values())
        unkept = [index for index in self._maps if index not in kept]
        for index in unkept[: len(unkept) - others]:
            del self._maps[index]
            if index in self._uses:
                self.cache.release(self.files[index], self._uses.pop(index))


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
