"""Takes out documents that hold a part of an evaluation set (GPT-3: arXiv 2005.14165, appendix C)."""

import pickle
from functools import lru_cache
from typing import Any

import numpy as np
from datatrove.data import Document

from data.cli import standing_at
from data.corpus.grams import grams, hashes
from data.sources import Source

SHORTEST = 8  # words that are looked for inside a document; GPT-3's least, against matches by chance


class Decontaminate:
    """Drops documents that share a run of n words with an evaluation set; the reason is the name of the set.

    against: the sets by name. Case and marks make no difference; each Chinese or Japanese character is a
    word. A text of fewer than n words is looked for whole; one of fewer than SHORTEST only drops a document
    that holds nothing else. Raises ValueError where there is no set, or one without words.
    """

    def __init__(self, against: dict[str, Source], n: int = 13) -> None:
        if not against:
            raise ValueError("against: names no evaluation set; name one, or leave the stage out")
        if n < SHORTEST:
            raise ValueError(f"n: {n} is less than {SHORTEST} words, which match by chance")
        self.against = against
        self.n = n
        self._pickled = pickle.dumps(against)

    def begin(self, task: int) -> None:
        _tables(self._pickled, self.n)

    def __call__(self, document: Document) -> str | None:
        numbers = hashes(document.text)
        found = len(self.against)
        for size, (keys, sets) in _tables(self._pickled, self.n).items():
            if size >= SHORTEST or size == len(numbers):
                runs = grams(numbers, size)
                places = np.minimum(np.searchsorted(keys, runs), len(keys) - 1)
                found = min([found, *sets[places[keys[places] == runs]].tolist()])
        return list(self.against)[found] if found < len(self.against) else None

    def inputs(self) -> dict[str, Any]:
        found = {}
        for name, source in self.against.items():
            with standing_at(f"data.source.against.{name}"):
                found[name] = source.inputs()
        return found


@lru_cache(1)  # of a process: its tasks share it
def _tables(pickled: bytes, n: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By words in a run: the runs of all sets (uint64, sorted), and the number of the first set of each."""
    against: dict[str, Source] = pickle.loads(pickled)
    runs: dict[int, list[tuple[np.ndarray, int]]] = {}
    for number, (name, source) in enumerate(against.items()):
        empty = True
        with standing_at(f"data.source.against.{name}"):
            for size, found in _runs(source, n):
                runs.setdefault(size, []).append((found, number))
                empty = False
        if empty:
            raise ValueError(f"against.{name}: holds no words; name another evaluation set")
    tables = {}
    for size, parts in runs.items():
        keys = np.concatenate([part for part, _ in parts])
        sets = np.concatenate([np.full(len(part), number, np.uint16) for part, number in parts])
        keys, first = np.unique(keys, return_index=True)
        tables[size] = keys, sets[first]
    return tables


def _runs(source: Source, n: int) -> Any:
    """(words in a run, uint64 of the runs) of each text."""
    text = ""
    for piece in source.documents():
        text += piece.text
        if piece.ends:
            numbers = hashes(text)
            if len(numbers):
                size = min(n, len(numbers))
                yield size, np.unique(grams(numbers, size))
            text = ""
