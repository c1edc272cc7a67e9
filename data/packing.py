"""Packing: which stretches of the token stream make up a sample.

Chunks cuts the stream into windows of equal length, whatever lies in them. BestFit keeps documents whole as
far as they fit: each is cut into windows and a rest, and the rests share windows, longest first, each in the
fullest one that still has room (best-fit decreasing, as in arXiv 2404.10830, section 3).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol, overload, runtime_checkable

import numpy as np

from data.shards import TokenStream

PADDING = -1  # the document of a position that holds nothing


@dataclass(frozen=True)
class Sample:
    """What a collator makes one sequence of.

    tokens: ids [n] of all pieces, one after the other; n may be 0. before: ids [k] of the token that stands
    before each piece in the stream, END_OF_TEXT where the piece starts a document. bounds: int64 [k + 1];
    piece i is tokens[bounds[i] : bounds[i + 1]], all of one document. key: (epoch, index), of a row that was
    cut out (epoch, index, row), which together with a seed is all that chance may depend on. step: of
    training; None in evaluation.
    """

    tokens: np.ndarray
    before: np.ndarray
    bounds: np.ndarray
    key: tuple[int, ...]
    step: int | None = None

    @classmethod
    def empty(cls, key: tuple[int, ...], step: int | None) -> Sample:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.zeros(1, np.int64), key, step)

    def random(self, seed: int) -> np.random.Generator:
        """The sample's own random numbers: the same in any world, after any restart."""
        return np.random.default_rng((seed % 2**64, *self.key))

    def cut(self, length: int, rows: int) -> list[Sample]:
        """The sample as `rows` shorter ones of `length` tokens each, the last of them shorter or empty where
        it holds fewer than length * rows. One row is the sample as it is."""
        if rows == 1:
            return [self]
        return [self._row(row, row * length, (row + 1) * length) for row in range(rows)]

    def _row(self, row: int, start: int, stop: int) -> Sample:
        key, stop = (*self.key, row), min(stop, len(self.tokens))
        if start >= stop:
            return Sample.empty(key, self.step)
        first, end = np.searchsorted(self.bounds, [start + 1, stop]) - [1, 0]
        before = self.before[first:end].copy()
        if start > self.bounds[first]:
            before[0] = self.tokens[start - 1]
        bounds = np.clip(self.bounds[first : end + 1], start, stop) - start
        return Sample(self.tokens[start:stop], before, bounds, key, self.step)


@dataclass(frozen=True)
class Usage:
    """What packing does to a stream: documents in more than one piece, and tokens that no window holds."""

    cut_documents: int
    dropped_tokens: int


def document_ids(bounds: np.ndarray, length: int) -> np.ndarray:
    """int32 [length]: 0, 1, 2, ... for the positions of each piece, PADDING for those past the last."""
    ids = np.full(length, PADDING, np.int32)
    ids[: bounds[-1]] = np.repeat(np.arange(len(bounds) - 1, dtype=np.int32), np.diff(bounds))
    return ids


class Readable(Protocol):
    """What samples are read from one by one. window: the most tokens of a sample."""

    window: int

    def sample(self, index: int, epoch: int = 0, step: int | None = None) -> Sample: ...


@runtime_checkable
class Stretched(Protocol):
    """Samples of which most lie in the stream as they are."""

    def stretch(self, index: int) -> np.ndarray | None:
        """ids [1 + window]: the token before a sample and its own; None where it is not one whole stretch."""
        ...


class Samples(Readable, Protocol):
    """The samples of one pass over a corpus. samples: how many."""

    samples: int

    def usage(self) -> Usage: ...


class Draw(Sequence[Sample]):
    """Samples of a micro-batch, each cut into rows. They are made when the first is looked at: a collator
    that can do with text() spares that, most of the work."""

    def __init__(
        self, packing: Readable, indices: Sequence[int], epochs: Sequence[int], step: int | None, rows: int
    ) -> None:
        self._packing, self._indices, self._epochs = packing, indices, epochs
        self._step, self._rows = step, rows

    def text(self) -> np.ndarray | None:
        """ids [samples, 1 + window]: the token before each sample and its own, not cut. None where they are
        not whole stretches of the stream."""
        if not isinstance(self._packing, Stretched):
            return None
        texts = [self._packing.stretch(index) for index in self._indices]
        whole = [text for text in texts if text is not None]
        return np.stack(whole) if len(whole) == len(texts) else None

    def __len__(self) -> int:
        return len(self._indices) * self._rows

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @cached_property
    def _samples(self) -> list[Sample]:
        drawn = zip(self._indices, self._epochs, strict=True)
        samples = [self._packing.sample(index, epoch, self._step) for index, epoch in drawn]
        length = self._packing.window // self._rows
        return [row for sample in samples for row in sample.cut(length, self._rows)]


class Packing:
    """The samples of one pass over a stream. window: the most tokens of a sample. samples: how many."""

    samples: int

    def __init__(self, stream: TokenStream, window: int) -> None:
        self.stream = stream
        self.window = window

    def pieces(self, index: int) -> np.ndarray:
        """int64 [k, 2]: the stretches [start, stop) of the stream that make up sample `index`."""
        raise NotImplementedError

    def usage(self) -> Usage:
        raise NotImplementedError

    def sample(self, index: int, epoch: int = 0, step: int | None = None) -> Sample:
        """Sample `index`; past the last one an empty sample."""
        if index >= self.samples:
            return Sample.empty((epoch, index), step)
        pieces = self.pieces(index)
        texts = [self.stream.read(int(start) - 1, int(stop)) for start, stop in pieces]
        return Sample(
            tokens=np.concatenate([text[1:] for text in texts]).astype(np.int64),
            before=np.array([text[0] for text in texts], np.int64),
            bounds=np.cumsum([0, *(stop - start for start, stop in pieces)], dtype=np.int64),
            key=(epoch, index),
            step=step,
        )


class Chunks(Packing):
    """Window i is tokens[i * window : (i + 1) * window]. rest: whether the last, shorter one counts."""

    def __init__(self, stream: TokenStream, window: int, rest: bool) -> None:
        super().__init__(stream, window)
        self.samples = -(-stream.tokens // window) if rest else stream.tokens // window
        self._offsets = stream.offsets

    def pieces(self, index: int) -> np.ndarray:
        start, stop = index * self.window, min((index + 1) * self.window, self.stream.tokens)
        first, last = np.searchsorted(self._offsets, [start + 1, stop])
        bounds = np.array([start, *self._offsets[first:last], stop], np.int64)
        return np.stack([bounds[:-1], bounds[1:]], axis=1)

    def sample(self, index: int, epoch: int = 0, step: int | None = None) -> Sample:
        """As any packing's, faster: the pieces lie one after the other, so one read will do."""
        if index >= self.samples:
            return Sample.empty((epoch, index), step)
        start, stop = index * self.window, min((index + 1) * self.window, self.stream.tokens)
        first, last = self._offsets.searchsorted((start + 1, stop)).tolist()
        bounds = np.empty(last - first + 2, np.int64)
        bounds[0], bounds[1:-1], bounds[-1] = start, self._offsets[first:last], stop
        bounds -= start
        text = self.stream.read(start - 1, stop).astype(np.int64)
        return Sample(text[1:], text[bounds[:-1]], bounds, (epoch, index), step)

    def stretch(self, index: int) -> np.ndarray | None:
        """Sample `index` as it lies in the stream: ids [1 + window], the token before it and its own. None
        where it is shorter or empty."""
        start, stop = index * self.window, (index + 1) * self.window
        return self.stream.read(start - 1, stop) if stop <= self.stream.tokens else None

    def usage(self) -> Usage:
        held = min(self.samples * self.window, self.stream.tokens)
        starts, ends = self._offsets[:-1] // self.window, (self._offsets[1:] - 1) // self.window
        return Usage(
            cut_documents=int((starts != ends).sum()),
            dropped_tokens=self.stream.tokens - held,
        )


class BestFit(Packing):
    """Every token is in one window; a document is cut only where it is longer than a window.

    overhead: what a collator adds to each piece. A window then has room for `window` tokens in one piece, and
    for that many fewer in every further one. Planned in memory from the documents' lengths: about 130 bytes
    and 2 microseconds a document, of which 18 bytes stay.
    """

    def __init__(self, stream: TokenStream, window: int, overhead: int = 0) -> None:
        super().__init__(stream, window)
        plan = _best_fit(np.asarray(stream.offsets), window, overhead)
        self._starts, self._stops, self._bounds = plan
        self.samples = len(self._bounds) - 1

    def pieces(self, index: int) -> np.ndarray:
        part = slice(self._bounds[index], self._bounds[index + 1])
        return np.stack([self._starts[part], self._stops[part]], axis=1)

    def usage(self) -> Usage:
        return Usage(
            cut_documents=int((np.diff(self.stream.offsets) > self.window).sum()),
            dropped_tokens=0,
        )


class Joined:
    """Several packings of equal window as one: the samples of the first, then those of the second, ..."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = list(parts)
        self.window = max(part.window for part in self.parts)
        self._starts = list(accumulate((part.samples for part in self.parts), initial=0))
        self.samples = self._starts[-1]
        self._stretched = all(isinstance(part, Stretched) for part in parts)

    def sample(self, index: int, epoch: int = 0, step: int | None = None) -> Sample:
        """Sample `index`; past the last one an empty sample. Its key is of the joined index."""
        if index >= self.samples:
            return Sample.empty((epoch, index), step)
        part, place = self._place(index)
        return replace(part.sample(place, epoch, step), key=(epoch, index))

    def stretch(self, index: int) -> np.ndarray | None:
        """As of Chunks, where the parts are such."""
        if not self._stretched or index >= self.samples:
            return None
        part, place = self._place(index)
        return part.stretch(place)  # type: ignore[attr-defined]

    def _place(self, index: int) -> tuple[Samples, int]:
        part = bisect_right(self._starts, index) - 1
        return self.parts[part], index - self._starts[part]

    def usage(self) -> Usage:
        usages = [part.usage() for part in self.parts]
        return Usage(
            cut_documents=sum(usage.cut_documents for usage in usages),
            dropped_tokens=sum(usage.dropped_tokens for usage in usages),
        )


def _best_fit(offsets: np.ndarray, window: int, overhead: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts and stops of all pieces, window by window, and int64 [windows + 1] where each window begins."""
    lengths = np.diff(offsets)
    whole = lengths // window
    full_starts = np.repeat(offsets[:-1], whole) + window * _counts(whole)
    rest_starts, rests = offsets[:-1] + whole * window, lengths % window
    longest_first = np.argsort(-rests, kind="stable")
    longest_first = longest_first[rests[longest_first] > 0]
    bins: list[list[int]] = []
    open_bins: defaultdict[int, list[int]] = defaultdict(list)  # by room left
    rooms: list[int] = []  # the keys of open_bins, ascending
    for document in longest_first.tolist():
        size = int(rests[document]) + overhead
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, bin_ = window + overhead, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            bin_ = open_bins[room].pop()
            if not open_bins[room]:
                rooms.pop(place)
        bins[bin_].append(document)
        left = room - size
        if left:
            if not open_bins[left]:
                rooms.insert(bisect_left(rooms, left), left)
            open_bins[left].append(bin_)
    packed = np.array([document for bin_ in bins for document in bin_], np.int64)
    starts = np.concatenate([full_starts, rest_starts[packed]])
    stops = np.concatenate([full_starts + window, rest_starts[packed] + rests[packed]])
    counts = np.concatenate([np.ones(len(full_starts), np.int64), [len(bin_) for bin_ in bins]])
    return starts, stops, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _counts(repeats: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for each n of `repeats`."""
    total = int(repeats.sum())
    firsts = np.repeat(np.cumsum(repeats) - repeats, repeats)
    return np.arange(total) - firsts
