"""Fill-in-the-middle: a document is parted in three and its middle moved to the end (Bavarian et al. 2022,
arXiv 2207.14255).

Two orders, section 3 (PSM) and appendix D (SPM, variant 2, in which prefix and middle run on, so that it is
PSM with an empty prefix and one order helps to learn the other):

    PSM  <prefix> prefix <suffix> suffix <middle> middle END_OF_TEXT
    SPM  <prefix> <suffix> suffix <middle> prefix middle END_OF_TEXT

The three parts meet at two positions drawn uniformly among the tokens (appendix C, token level).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from data.shards import TokenStream
from data.tokenizer import special_ids

MARKS = 3  # tokens that a rearranged text is longer by
SHORTEST = 3  # tokens of a text that has three parts


@dataclass(frozen=True)
class Infill:
    """How texts are rearranged. rate: the chance of a text. spm_share: of these, the chance of SPM.
    prefix, middle, suffix: ids of the tokens in front of each part."""

    rate: float
    spm_share: float
    prefix: int
    middle: int
    suffix: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float, spm_share: float) -> Infill:
        """Raises ValueError where the tokenizer lacks the tokens."""
        prefix, middle, suffix = special_ids(tokenizer, "infilling")
        return cls(rate, spm_share, prefix, middle, suffix)

    def layout(self, length: int, random: np.random.Generator) -> list[int | slice]:
        """A text of `length` tokens rearranged: tokens to insert, and stretches of the text."""
        spm = random.random() < self.spm_share
        first, second = np.sort(random.integers(0, length, 2, endpoint=True)).tolist()
        prefix, middle, suffix = slice(0, first), slice(first, second), slice(second, length)
        if spm:
            return [self.prefix, self.suffix, suffix, self.middle, slice(0, second)]
        return [self.prefix, prefix, self.suffix, suffix, self.middle, middle]


class InfilledStream(TokenStream):
    """A stream with some of its documents rearranged and so longer by MARKS tokens; nothing is written.

    Whether a document is, and how, depends on the seed and the document's index alone; those of fewer than
    SHORTEST tokens never are. A read costs what it reads, however long the documents are. In memory: 9 bytes
    a document.
    """

    def __init__(
        self, stream: TokenStream, tokenizer: Tokenizer, rate: float, spm_share: float, seed: int
    ) -> None:
        super().__init__(stream.folder, stream.split)
        self.shards = stream.shards
        self.infill = Infill.of(tokenizer, rate, spm_share)
        self.seed = seed
        self._plain = stream
        self._plain_offsets = stream.offsets
        self._dtype = stream.read(0, 0).dtype
        chances = np.random.default_rng((seed, 1)).random(self.documents)
        self._chosen = (chances < rate) & (np.diff(self._plain_offsets) > SHORTEST)
        self._offsets = np.array(self._plain_offsets)
        self._offsets[1:] += MARKS * np.cumsum(self._chosen)
        self.tokens = int(self._offsets[-1])

    @property
    def offsets(self) -> np.ndarray:
        return self._offsets

    def shards_of(self, stretches: np.ndarray) -> list[int]:
        """The shards of all documents that the stretches touch."""
        wanted = stretches[stretches[:, 0] < stretches[:, 1]]
        first = np.searchsorted(self._offsets, np.maximum(wanted[:, 0], 0), side="right") - 1
        last = np.searchsorted(self._offsets, wanted[:, 1])
        documents = np.stack([first, np.maximum(last, first + 1)], axis=1)
        return self._plain.shards_of(self._plain_offsets[documents] - [1, 0])

    def read(self, start: int, stop: int) -> np.ndarray:
        if not -1 <= start <= stop <= self.tokens:
            raise IndexError(f"[{start}, {stop}) is outside the {self.tokens} tokens of {self.split}")
        parts = [self._plain.read(-1, min(stop, 0) if start == -1 else -1)]
        start = max(start, 0)
        while start < stop:
            document = int(np.searchsorted(self._offsets, start, side="right")) - 1
            first, end = int(self._offsets[document]), min(int(self._offsets[document + 1]), stop)
            parts += self._read_document(document, start - first, end - first)
            start = end
        return np.concatenate(parts)

    def _read_document(self, document: int, start: int, stop: int) -> list[np.ndarray]:
        """Tokens start, ..., stop - 1 of a document, in pieces."""
        first, end = (int(offset) for offset in self._plain_offsets[document : document + 2])
        if not self._chosen[document]:
            return [self._plain.read(first + start, first + stop)]
        length = end - first - 1  # without END_OF_TEXT, which stays last
        if start == length + MARKS:  # what stands before the next document is asked for with each of them
            return [self._plain.read(end - 1, first + stop - MARKS)]
        random = np.random.default_rng((self.seed, 2, document))
        pieces = []
        position = 0
        for part in [*self.infill.layout(length, random), slice(length, length + 1)]:
            size = part.stop - part.start if isinstance(part, slice) else 1
            low, high = max(start - position, 0), min(stop - position, size)
            position += size
            if low >= high:
                continue
            if isinstance(part, slice):
                pieces.append(self._plain.read(first + part.start + low, first + part.start + high))
            else:
                pieces.append(np.array([part], self._dtype))
        return pieces
