"""Knowledge masking: words, phrases and entities of a text are hidden whole.

Shapes: B batch, T sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.collate.masked import Masked
from data.units.base import Finder, Span

LEVELS = ("entity", "phrase", "word")  # a token is of the first that has a unit for it
PREFERENCE = 2.0  # how much likelier a unit is drawn than one of the level that came in before its own


class Knowledge(Masked):
    """Masked, with units of up to three levels, each masked whole (ERNIE 1.0: Sun et al. 2019, arXiv
    1904.09223, section 3.2).

    stages: by level the training step from which it takes part; in evaluation all do. finders: what finds the
    units of a level in text; words are, beside those found, those of Surface.words.

    Entities claim their tokens first, then phrases, then words; a unit that meets a claimed token, or a
    special one, is left out. Units are drawn at random, without replacement, until none fits what is left of
    rate. The paper learns words, phrases and entities in this order (sections 3.2.1 to 3.2.3), masks a few of
    a sentence's units each time, so that the others are context, and does not say what a later stage does
    with the units of an earlier one. Here the chance to be drawn next doubles from each level to the one that
    came in after it: the newest is preferred, but neither masked throughout nor alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        stages: Mapping[str, int],
        finders: Mapping[str, Finder],
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, sequence_length, **options)
        self.stages = stages
        self.finders = finders
        self.levels = tuple(level for level in LEVELS if level in stages)
        arrivals = sorted(set(stages.values()))
        self._weights = PREFERENCE ** np.array([arrivals.index(stages[level]) for level in self.levels])

    def _choose(
        self, ids: np.ndarray, step: int | None, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        free = self._is_text[ids]
        units, levels = self._claims(ids, free, step)
        lengths = np.diff(units, axis=1)[:, 0]
        # Of exponential variables the least is each one with a chance in proportion to its rate.
        order = np.argsort(random.exponential(size=len(units)) / self._weights[levels])
        left = max(1, round(self.rate * int(free.sum())))
        fitting = []
        for unit in order.tolist():
            if lengths[unit] <= left:
                fitting.append(unit)
                left -= lengths[unit]
        drawn = np.array(fitting, np.int64) if fitting else order[:1]
        hidden = np.zeros(len(ids), bool)
        for start, stop in units[drawn].tolist():
            hidden[start:stop] = True
        counts = np.bincount(levels[drawn], weights=lengths[drawn], minlength=len(self.levels))
        return np.flatnonzero(hidden), counts.astype(np.int64)

    def _claims(self, ids: np.ndarray, free: np.ndarray, step: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The units that may be drawn: int64 [k, 2] stretches of ids, and int64 [k] of self.levels."""
        text, owner = self.surface.spell(ids)
        taken = bytearray(~free)
        units, levels = [], []
        for place, level in enumerate(self.levels):
            if step is not None and step < self.stages[level]:
                continue
            spans = self.finders[level](text) if level in self.finders else []
            stretches = _stretches(spans, owner, len(ids))
            if level == "word":
                stretches = np.concatenate([stretches, self._words(ids)])
            for start, stop in stretches.tolist():
                if taken.find(1, start, stop) < 0:
                    taken[start:stop] = bytes([1]) * (stop - start)
                    units.append((start, stop))
                    levels.append(place)
        return np.array(units, np.int64).reshape(-1, 2), np.array(levels, np.int64)


def _stretches(spans: Sequence[Span], owner: np.ndarray, length: int) -> np.ndarray:
    """int64 [k, 2]: the stretches of `length` tokens that hold these spans of the text; owner: of each
    character the token with its first byte."""
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
    # The rest of a last character that takes several tokens reaches up to where the next one begins.
    nexts = np.append(owner, length)[stops]
    return np.stack([owner[starts], np.maximum(owner[stops - 1] + 1, nexts)], axis=1)
