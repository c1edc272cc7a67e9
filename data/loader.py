"""Batches for one rank: the samples behind an order, or all of a stream for evaluation."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import torch

from data.order import Ordered
from data.packing import BestFit, Chunks, Draw, Packing, Readable, Sample, Samples
from data.prefetch import prefetcher
from data.shards import TokenStream

IGNORED = -100
Batch = dict[str, torch.Tensor]
METHODS = ("chunk", "best_fit")


class Collate(Protocol):
    """Makes batches. window: the most tokens of the stream that one of its samples holds, if they are in one
    piece. overhead: how many fewer for every further piece."""

    window: int
    overhead: int

    def __call__(self, samples: Sequence[Sample]) -> Batch: ...


def pack(stream: TokenStream, method: str, collate: Collate, training: bool) -> Packing:
    """The samples of a stream under one of METHODS. Chunks leave out the stream's rest in training.

    Raises ValueError where there is none.
    """
    window = collate.window
    if method == "best_fit":
        packing: Packing = BestFit(stream, window, collate.overhead)
    else:
        packing = Chunks(stream, window, rest=not training)
    if packing.samples < 1:
        raise ValueError(
            f"sequence_length: a sample takes {window} tokens, more than the {stream.tokens} of "
            f"{stream.folder} ({stream.split}); choose a shorter one or a larger corpus"
        )
    return packing


@runtime_checkable
class Resumable(Protocol):
    """Samples that can only be read onwards: where the reading is, as JSON, and going on from there."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Loader:
    """The training micro-batches of one rank, made ahead in a background thread.

    A step's samples are dealt out as order.step(s).reshape(accumulation, world_size, micro_batch): the union
    over ranks and micro-batches is the same whatever these numbers are. Where order.steps cuts them into
    shorter rows, a micro-batch has as many more rows, so that it holds as many tokens. collates: what makes
    batches of shorter rows, by their length. waited_s: seconds step() was blocked.
    Raises ValueError where a step's samples do not divide.
    """

    def __init__(
        self,
        packing: Readable,
        order: Ordered,
        collate: Collate,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        ahead: int = 2,
        collates: Mapping[int, Collate] | None = None,
    ) -> None:
        order.steps.check(micro_batch, world_size)
        self.packing = packing
        self.order = order
        self.collates = {**(collates or {}), packing.window: collate}
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.ahead = ahead
        self.waited_s = 0.0
        self._pending: dict[int, Future[tuple[list[Batch], dict[str, Any] | None]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._state = self._reading()
        self._prefetcher = prefetcher(packing, order)

    def step(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step, in order; the steps after it are made while this one trains.

        Any step may be asked for: steps made ahead that no longer follow are dropped. An error in the
        thread is raised here.
        """
        if self._prefetcher is not None:
            self._prefetcher.at(step)
        started = time.perf_counter()
        wanted = range(step, step + 1 + self.ahead)
        for passed in [s for s in self._pending if s not in wanted]:
            self._pending.pop(passed).cancel()
        for s in wanted:
            if s not in self._pending:
                self._pending[s] = self._thread.submit(self._make, s)
        batches, self._state = self._pending.pop(step).result()
        self.waited_s += time.perf_counter() - started
        return batches

    def state(self) -> dict[str, Any] | None:
        """Where Resumable samples were read to by this rank when the step asked for last was made, not the
        steps made ahead of it. None: nothing has to be kept."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state, of this rank or merged: the steps made ahead are dropped."""
        assert isinstance(self.packing, Resumable)
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()
        self._thread.submit(self.packing.load_state, state).result()  # behind what it is still making
        self._state = state

    def close(self) -> None:
        """Stop the threads, and close what they read."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._thread.shutdown(cancel_futures=True)
        if isinstance(self.packing, Resumable):
            self.packing.close()

    def _make(self, step: int) -> tuple[list[Batch], dict[str, Any] | None]:
        shape = (-1, self.world_size, self.micro_batch)
        ids = self.order.step(step).reshape(shape)[:, self.rank]
        epochs = self.order.epochs(step).reshape(shape)[:, self.rank]
        rows = self.order.steps.rows(step)
        length = self.packing.window // rows
        batches = []
        for micro in zip(ids.tolist(), epochs.tolist(), strict=True):
            batches.append(self.collates[length](Draw(self.packing, *micro, step, rows)))
        return batches, self._reading()

    def _reading(self) -> dict[str, Any] | None:
        return self.packing.state() if isinstance(self.packing, Resumable) else None


def evaluation_batches(
    packing: Samples, collate: Collate, *, micro_batch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Every sample once over all ranks, in batches of micro_batch.

    Every rank yields the same number of batches (ZeRO-3 gathers parameters in step): those past the last
    sample are empty.
    """
    global_batch = micro_batch * world_size
    end = -(-packing.samples // global_batch) * global_batch
    for first in range(rank * micro_batch, end, global_batch):
        yield collate([packing.sample(i) for i in range(first, first + micro_batch)])
