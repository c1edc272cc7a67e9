"""What finds units in text, and the text that it is looked at with before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data.shards import TokenStream
from data.surface import Surface
from data.tokenizer import load_tokenizer

Span = tuple[int, int]  # characters start, ..., stop - 1 of a text
Finder = Callable[[str], list[Span]]  # spans in ascending order that do not overlap

READ = 2**14  # tokens at a time; where a document is cut, no unit is found across
CHECKED_BYTES = 10_000_000  # of text in which units must match at least once

# Scripts in which a name may stand against the next letter: Han, kana, Hangul (particles), Thai to Khmer.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u30ff\u3400-\u9fff"
UNSPACED += "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"


class Units:
    """The base of what finds units."""

    def check(self, key: str) -> None:
        """Refuse what is wrong before any data is made. Raises ValueError that starts with `key`, the place
        of these units in the configuration."""

    def finder(self, prepared: Path, key: str) -> Finder:
        """What finds the units in the text of a prepared folder.

        It is given a text as data.surface spells tokens, which may differ from what was encoded (letters
        folded, white space lost). Raises ValueError that starts with `key`.
        """
        raise NotImplementedError

    def identity(self, prepared: Path) -> str:
        """Another one where other units would be found: a digest, or the version of what finds them."""
        raise NotImplementedError

    def named(self, key: str) -> str:
        """How a message names these units."""
        return f"{key}: {type(self).__name__}"

    def in_use(self, prepared: Path, key: str) -> Finder:
        """The finder, after it has found something in the beginning of the training text.

        Raises ValueError where it finds nothing: every step would then train as if it were not there.
        """
        find = self.finder(prepared, key)
        if not any(find(text) for text in training_text(prepared, CHECKED_BYTES)):
            raise ValueError(
                f"{self.named(key)} matches nothing in the first {CHECKED_BYTES // 10**6} MB of "
                f"{prepared.name}; choose units in the language of the text, or other text"
            )
        return find


def digest(entries: Iterable[str]) -> str:
    """Of entries in their order."""
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def leftmost_longest(spans: Iterable[Span]) -> list[Span]:
    """Of spans that overlap, the one that starts first, and of those the longest."""
    kept: list[Span] = []
    for start, stop in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, stop))
    return kept


def training_text(prepared: Path, size: int) -> Iterator[str]:
    """The training text of a prepared folder as its tokens spell it, up to about `size` bytes of UTF-8, a
    document or a stretch of a long one at a time."""
    stream, surface = TokenStream(prepared, "train"), Surface(load_tokenizer(prepared / "tokenizer"))
    offsets = stream.offsets
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for first in range(start, end - 1, READ):  # without END_OF_TEXT
            text, _ = surface.spell(stream.read(first, min(first + READ, end - 1)))
            yield text
            size -= len(text.encode())
            if size <= 0:
                return
