"""Training text that is read and tokenized while a model trains: nothing is prepared but the tokenizer.

A corpus is dealt into a fixed number V of shards. The tokens of each are cut into windows in their order, and
a shard that ends begins again. Sample p of the endless order is window p // V of shard p % V, whatever the
number of ranks. Only reading onwards is possible, from the beginning or from a state, which says of every
shard in which document, and where in it, its next window begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.documents import Documents, State, Text
from data.packing import Sample
from data.tokenizer import END_OF_TEXT


class StreamPacking:
    """The windows of a corpus that is tokenized as it is read. window: tokens of each.

    A rank opens the shards that it has samples of, and reads each to where its next window ends. So ranks
    read apart where V is a multiple of micro_batch * world_size, and otherwise some of the same shards.
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer, window: int) -> None:
        self.documents = documents
        self.window = window
        self.tokenizer = tokenizer
        end = tokenizer.token_to_id(END_OF_TEXT)
        assert end is not None, "every tokenizer has it"
        self._end = end
        self._open: dict[int, _Shard] = {}
        self._states: dict[int, State] = {}  # of shards that are not open

    def fresh(self) -> StreamPacking:
        """The same windows, read from the beginning."""
        return StreamPacking(self.documents, self.tokenizer, self.window)

    def sample(self, index: int, epoch: int = 0, step: int | None = None) -> Sample:
        """Sample `index`; those of a shard can only be asked for in ascending order. The epoch of its key is
        that of its shard where the window begins. Raises ValueError on what cannot be read."""
        window, number = divmod(index, self.documents.shards)
        if number not in self._open:
            self._open[number] = _Shard(self.documents, number, self._end, self._states.pop(number, None))
        shard = self._open[number]
        if window < shard.window:
            raise ValueError(f"sample {index} was read before; load a state from before it")
        while shard.window <= window:
            self._fill(shard)
            taken = shard.take(self.window)
        return Sample(*taken.stretch, key=(taken.epoch, index), step=step)

    def state(self) -> State:
        """Where the next window of every shard read begins."""
        states = self._states | {number: shard.state() for number, shard in self._open.items()}
        of = {str(number): states[number] for number in sorted(states)}
        return {"shards": self.documents.shards, "window": self.window, "of": of}

    def load_state(self, state: State) -> None:
        """Go on from a state, of one rank or merged. Raises ValueError where it is of another division."""
        for key, own in (("shards", self.documents.shards), ("window", self.window)):
            if state[key] != own:
                raise ValueError(
                    f"data.{key}: {own}, and the state to go on from is of {state[key]}; set it back"
                )
        self.close()
        self._states = {int(number): of for number, of in state["of"].items()}

    def state_at(self, first: int) -> State:
        """The state of a corpus of which nothing was read, and whose first sample is to be number `first`."""
        shards = self.documents.shards
        start = {"epoch": 0, "offset": 0, "before": self._end, "reading": None}
        of = {str(v): {"window": max(0, -((v - first) // shards)), **start} for v in range(shards)}
        return {"shards": shards, "window": self.window, "of": of}

    def close(self) -> None:
        """Close all files. What was read is forgotten."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()
        self._states.clear()

    def _fill(self, needed: _Shard) -> None:
        """Have a window's tokens in a shard. The others that are short of one read on, too: the tokenizer
        takes several texts at once, on all cores."""
        while needed.held < self.window:
            short = [shard for shard in self._open.values() if shard.held < self.window]
            texts = [shard.read() for shard in short]
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for shard, encoding in zip(short, encodings, strict=True):
                shard.append(encoding.ids)


def merge(states: Iterable[State]) -> State:
    """The states of all ranks after the same step as one. Of a shard that several have read, the one that has
    got furthest counts: none is past a window that is still to come."""
    merged: State = {}
    for state in states:
        merged = merged or {**state, "of": {}}
        for number, of in state["of"].items():
            if number not in merged["of"] or of["window"] > merged["of"][number]["window"]:
                merged["of"][number] = of
    merged["of"] = {number: merged["of"][number] for number in sorted(merged["of"], key=int)}
    return merged


class _Taken(NamedTuple):
    """A window: tokens, before and bounds as in Sample."""

    stretch: tuple[np.ndarray, np.ndarray, np.ndarray]
    epoch: int


@dataclass
class _Piece:
    """Tokens of a text. begins: whether a document begins with them. reading: the state to read it again."""

    tokens: np.ndarray
    begins: bool
    epoch: int
    reading: State | None


class _Shard:
    """One shard: the documents read and not used up, and the reading that goes on behind them.

    window: the next, from 0. held: tokens read and not taken.
    """

    def __init__(self, documents: Documents, number: int, end: int, state: State | None) -> None:
        self.documents = documents
        self.number = number
        self.end = end
        self.window: int = state["window"] if state else 0
        self._before: int = state["before"] if state else end  # the token before the next
        self._offset: int = state["offset"] if state else 0  # tokens of the first piece that are used up
        self._epoch: int = state["epoch"] if state else 0  # of what is read next, from `_reading` on
        self._reading: State | None = state["reading"] if state else None
        self._pieces: deque[_Piece] = deque()
        self._texts = documents.read(number, self._reading)
        self._last: Text
        self._empty = self._reading is None  # a pass has begun, and there was nothing so far
        self.held = -self._offset  # tokens that come again first

    def read(self) -> str:
        """The next text. Raises ValueError where the shard has none."""
        found = next(self._texts, None)
        if found is None:
            if self._empty:
                raise ValueError(
                    f"data.shards: shard {self.number} of {self.documents.shards} holds no text; set fewer"
                )
            self._epoch, self._reading, self._empty = self._epoch + 1, None, True
            self._texts = self.documents.read(self.number, None)
            return self.read()
        self._last = found
        return found.text

    def append(self, ids: list[int]) -> None:
        """Hold the tokens of the text read last."""
        text = self._last
        tokens = np.array([*ids, self.end] if text.ends and text.text else ids, np.int64)
        self._pieces.append(_Piece(tokens, text.begins, self._epoch, self._reading))
        self._empty = self._empty and not len(tokens)
        self.held += len(tokens)
        self._reading = text.after

    def take(self, length: int) -> _Taken:
        """The next window. `length` tokens must be held."""
        parts: list[np.ndarray] = []
        starts: list[int] = []
        before: list[int] = []
        epoch, taken = None, 0
        while taken < length:
            piece = self._pieces[0]
            part = piece.tokens[self._offset : self._offset + length - taken]
            if len(part):
                epoch = piece.epoch if epoch is None else epoch
                if not taken or (piece.begins and not self._offset):
                    starts.append(taken)
                    before.append(self._before)
                parts.append(part)
                self._before = int(part[-1])
            taken, self._offset = taken + len(part), self._offset + len(part)
            if self._offset == len(piece.tokens):
                self._pieces.popleft()
                self._offset = 0
        self.window += 1
        self.held -= length
        assert epoch is not None
        bounds = np.array([*starts, length], np.int64)
        return _Taken((np.concatenate(parts), np.array(before, np.int64), bounds), epoch)

    def state(self) -> State:
        first = self._pieces[0] if self._pieces else None
        return {
            "window": self.window,
            "epoch": first.epoch if first else self._epoch,
            "offset": self._offset,
            "before": self._before,
            "reading": first.reading if first else self._reading,
        }

    def close(self) -> None:
        close = getattr(self._texts, "close", None)
        if close:
            close()
