"""Other documents for next-sentence prediction."""

from __future__ import annotations

import numpy as np

from data.shards import TokenStream
from data.surface import Surface

DRAWS = 10  # documents looked at for one that is another and long enough


class Elsewhere:
    """Finds stretches of other documents, in training of the one stream, in evaluation of the other.

    Raises ValueError where a stream has but one document.
    """

    def __init__(self, training: TokenStream, evaluation: TokenStream, surface: Surface) -> None:
        for stream in (training, evaluation):
            if stream.documents < 2:
                raise ValueError(
                    f"objective.pairs: next_sentence takes text of other documents, and {stream.split} of "
                    f"{stream.folder} has one; choose objective=masked-sentence-order"
                )
        self.surface = surface
        self._streams = {True: (training, training.offsets), False: (evaluation, evaluation.offsets)}

    def __call__(
        self, text: np.ndarray, length: int, training: bool, random: np.random.Generator
    ) -> np.ndarray:
        """At most `length` tokens from the beginning of a word on, fewer where the documents looked at are
        short, none where `text` is in all of them."""
        stream, offsets = self._streams[training]
        found = np.empty(0, np.int64)
        sought = text.astype(stream.read(0, 1).dtype).tobytes()
        for document in random.integers(stream.documents, size=DRAWS).tolist():
            start, stop = offsets[document : document + 2].tolist()
            other = stream.read(start, stop - 1)  # without END_OF_TEXT
            if len(other) <= len(found) or sought in other.tobytes():
                continue
            at = int(random.integers(max(1, len(other) - length + 1)))
            into = np.flatnonzero(np.diff(self.surface.words(other[max(at - 1, 0) : at + length])))
            at += int(into[0]) if at and len(into) else 0
            found = other[at : at + length].astype(np.int64)
            if len(found) >= length:
                break
        return found
