"""Batches for one rank: the tokens behind an order, or the whole of a stream for evaluation.

Sample i of sequence length T has inputs tokens[i*T - 1 : i*T + T - 1] and labels tokens[i*T : i*T + T], where
tokens[-1] is END_OF_TEXT, so that every token of the stream is predicted exactly once per epoch.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from data.order import Order
from data.shards import TokenStream

IGNORED = -100
Batch = dict[str, torch.Tensor]


class Collate(Protocol):
    def __call__(self, samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch: ...


def training_samples(stream: TokenStream, sequence_length: int) -> int:
    """How many whole samples the stream holds. Raises ValueError where there is none."""
    samples = stream.tokens // sequence_length
    if samples < 1:
        raise ValueError(
            f"sequence_length: {sequence_length} is longer than the {stream.tokens} tokens of "
            f"{stream.folder} ({stream.split}); choose a shorter one or a larger corpus"
        )
    return samples


class Loader:
    """The training micro-batches of one rank, made ahead in a background thread.

    A step's samples are dealt out as order.step(s).reshape(accumulation, world_size, micro_batch): the union
    over ranks and micro-batches is the same whatever these numbers are. waited_s: seconds step() was blocked.
    Raises ValueError where the global batch does not divide.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: Order,
        collate: Collate,
        *,
        sequence_length: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        ahead: int = 2,
    ) -> None:
        if order.global_batch % (micro_batch * world_size):
            raise ValueError(
                f"global_batch: {order.global_batch} is not divisible by micro_batch {micro_batch} x "
                f"{world_size} ranks; choose a multiple of {micro_batch * world_size}"
            )
        self.stream = stream
        self.order = order
        self.collate = collate
        self.sequence_length = sequence_length
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.ahead = ahead
        self.waited_s = 0.0
        self._pending: dict[int, Future[list[Batch]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def step(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step, in order; the steps after it are made while this one trains.

        Any step may be asked for: steps made ahead that no longer follow are dropped. An error in the
        thread is raised here.
        """
        started = time.perf_counter()
        wanted = range(step, step + 1 + self.ahead)
        for passed in [s for s in self._pending if s not in wanted]:
            self._pending.pop(passed).cancel()
        for s in wanted:
            if s not in self._pending:
                self._pending[s] = self._thread.submit(self._make, s)
        batches = self._pending.pop(step).result()
        self.waited_s += time.perf_counter() - started
        return batches

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, step: int) -> list[Batch]:
        ids = self.order.step(step).reshape(-1, self.world_size, self.micro_batch)[:, self.rank]
        return [
            self.collate([_sample(self.stream, int(i), self.sequence_length) for i in micro]) for micro in ids
        ]


def evaluation_batches(
    stream: TokenStream,
    collate: Collate,
    *,
    sequence_length: int,
    micro_batch: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Every token of the stream once over all ranks, in batches of micro_batch samples.

    Every rank yields the same number of batches of the same shape (ZeRO-3 gathers parameters in step): the
    last sample is padded and samples past the end are all padding, with labels IGNORED.
    """
    samples = -(-stream.tokens // sequence_length)
    global_batch = micro_batch * world_size
    for first in range(rank * micro_batch, -(-samples // global_batch) * global_batch, global_batch):
        yield collate([_padded(stream, i, sequence_length) for i in range(first, first + micro_batch)])


def _sample(stream: TokenStream, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = stream.read(index * length - 1, index * length + length)
    return tokens[:-1], tokens[1:]


def _padded(stream: TokenStream, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample `index`, its part past the end of the stream padded with END_OF_TEXT and IGNORED labels."""
    inputs = np.full(length, stream.end_of_text, np.int64)
    labels = np.full(length, IGNORED, np.int64)
    start, stop = index * length, min(index * length + length, stream.tokens)
    if start < stop:
        tokens = stream.read(start - 1, stop)
        inputs[: stop - start] = tokens[:-1]
        labels[: stop - start] = tokens[1:]
    return inputs, labels
