"""Shards of the next steps, brought into the cache beside training: the order of the samples is known."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

import numpy as np

from data.download import Stopped
from data.order import Ordered
from data.packing import Chunks, Joined, Packing, Readable
from data.remote import RemoteShards

STEPS = 1000  # that the prefetcher looks ahead
THREADS = 4  # that download
OPEN = 256  # shards in use at once: each holds two files open, of which a process may have 1,024


def prefetcher(packing: Readable, order: Ordered) -> Prefetcher | None:
    """What brings the shards of the next steps; None where all are local."""
    first = packing.parts[0] if isinstance(packing, Joined) else packing
    if isinstance(first, Packing) and isinstance(first.stream.shards, RemoteShards):
        return Prefetcher(packing, first.stream.shards, order)
    return None


class Prefetcher:
    """Brings the shards of the next steps into the cache, in the order of need, in threads beside training.

    It looks STEPS ahead, as far as half of the cache holds what they need: the other half is for what
    evaluation reads, and for processes that are a step behind. What cannot be brought is left to the reader,
    who tries again and says what is wrong.
    """

    def __init__(self, packing: Readable, shards: RemoteShards, order: Ordered) -> None:
        self.packing = packing
        self.shards = shards
        self.order = order
        self._needs: dict[int, list[int]] = {}  # the shards of a step
        self._step: int | None = None  # where training is
        self._planned: int | None = None  # the step from which on was looked ahead
        self._wanted: deque[int] = deque()
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        shards.join(self)
        for work in (self._plan, *[self._bring] * THREADS):
            threading.Thread(target=work, name="prefetch", daemon=True).start()

    def at(self, step: int) -> None:
        """Training takes `step` and those after it from now on.

        Raises ValueError where the cache is too small for what a step needs.
        """
        needed = self._needed(step)
        size = sum(self.shards.files[shard].size for shard in needed)
        if size > self._most() or len(needed) > OPEN:
            raise ValueError(
                f"data.cache_bytes: step {step} reads {len(needed)} shards of {size:,} bytes, more than"
                f" {OPEN} or half of the cache, {self._most():,}; set at least {2 * size}, or packing.block"
            )
        with self._changed:
            self._step = step
            self.shards.kept[self].update(needed)
            self._want(needed)

    def close(self) -> None:
        """Stop the threads, and whoever waits for a download unless others look ahead for the same stream."""
        with self._changed:
            self._stop.set()
            self.shards.leave(self)
            self._changed.notify_all()

    def _plan(self) -> None:
        """Work of the thread that looks ahead."""
        while not self._stop.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._stop.is_set() or self._step != self._planned)
                self._planned = self._step
            if self._planned is not None:
                self._look_ahead(self._planned)

    def _look_ahead(self, first: int) -> None:
        window: set[int] = set()
        size = 0
        with self._changed:  # until they are here, the line is for the shards of the first step alone
            self._changed.wait_for(lambda: self._passed(first) or self._settled(first))
        for step in range(first, first + STEPS):
            try:
                new = [shard for shard in self._needed(step) if shard not in window]
            except ValueError:  # past the last step that there is
                break
            size += sum(self.shards.files[shard].size for shard in new)
            if step > first and (size > self._most() or len(window) + len(new) > OPEN):
                break
            window.update(new)
            with self._changed:
                if self._passed(first):
                    return
                self.shards.kept[self].update(new)
                self._want(new)
            if len(window) == len(self.shards.files):
                break
        with self._changed:
            if not self._passed(first):
                self.shards.keep(self, window)
        for step in list(self._needs):
            if not first <= step < first + STEPS:
                self._needs.pop(step, None)

    def _passed(self, step: int) -> bool:
        """Whether training is elsewhere by now."""
        return self._step != step or self._stop.is_set()

    def _settled(self, step: int) -> bool:
        """Whether the shards of a step are here, or cannot be had."""
        return not (self._wanted or self._busy) or all(shard in self.shards for shard in self._needed(step))

    def _want(self, shards: list[int]) -> None:
        """Have shards brought after those that are wanted already."""
        self._wanted.extend(
            shard
            for shard in shards
            if not (shard in self.shards or shard in self._wanted or shard in self._busy)
        )
        self._changed.notify_all()

    def _bring(self) -> None:
        """Work of a thread that downloads."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop.is_set() or self._wanted)
                if self._stop.is_set():
                    return
                shard = self._wanted.popleft()
                if shard not in self.shards.kept[self]:
                    continue
                self._busy.add(shard)
            brought = False
            with suppress(ValueError, OSError, Stopped):
                brought = self.shards.bring(shard, self._stop)
            with self._changed:
                self._busy.remove(shard)
                self._changed.notify_all()
                if brought and not self._stop.is_set() and shard in self.shards.kept[self]:
                    self._want([shard])  # it may have been let go in between

    def _most(self) -> int:
        return self.shards.cache.most // 2

    def _needed(self, step: int) -> list[int]:
        """The shards that a step reads, in the order of need."""
        found = self._needs.get(step)
        if found is None:
            found = self._needs[step] = _shards_of(self.packing, self.order.step(step))
        return found


def _shards_of(packing: Readable, samples: np.ndarray) -> list[int]:
    """The shards that samples are read from, of one part after the other in the order of need."""
    if isinstance(packing, Joined):
        starts = np.cumsum([0, *(part.samples for part in packing.parts)])
        parts = np.searchsorted(starts, samples, "right") - 1
        found = [_shards_of(packing.parts[p], samples[parts == p] - starts[p]) for p in np.unique(parts)]
        return list(dict.fromkeys(shard for shards in found for shard in shards))
    assert isinstance(packing, Packing)
    if isinstance(packing, Chunks):  # where documents end does not matter: many times as fast
        starts = samples * packing.window
        stretches = np.stack([starts, np.minimum(starts + packing.window, packing.stream.tokens)], axis=1)
    else:
        stretches = np.concatenate([packing.pieces(int(sample)) for sample in samples])
    return packing.stream.shards_of(stretches - [1, 0])  # with the token before
