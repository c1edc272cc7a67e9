"""Units out of a list: a file of the user's, or the names of Python's standard library."""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from ahocorasick_rs import AhoCorasick

from data.sources import PythonLibrary
from data.surface import Surface
from data.tokenizer import UNKNOWN, load_tokenizer
from data.units.base import UNSPACED, Finder, Span, Units, digest, leftmost_longest

LETTER = re.compile(rf"[^\W{UNSPACED}]")  # of a script that sets words apart
CLASS = re.compile(r"^[ \t]*class[ \t]+([^\W_]\w{2,})[ \t]*[(:]", re.MULTILINE)
MODULE = re.compile(r"\b(?:import|from)[ \t]+([\w.]+)|(?<![\w.])(\w+)(?=\.\w)")


class Entries:
    """Finds entries in a text, from left to right the longest one, where it neither begins nor ends inside a
    word. Letters of a script without spaces make no words.

    Aho & Corasick 1975 ("Efficient string matching"), so that time does not grow with the number of entries.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._automaton = AhoCorasick(sorted(set(entries)))

    def __call__(self, text: str) -> list[Span]:
        matches = self._automaton.find_matches_as_indexes(text, overlapping=True)
        return leftmost_longest((start, stop) for _, start, stop in matches if _is_whole(text, start, stop))


class Lexicon(Units):
    """Entries of a file: UTF-8 text, one a line. An entry matches where the same letters stand, as the
    tokenizer keeps them (a lower-casing one does not tell cases apart), and no other word touches it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def check(self, key: str) -> None:
        self._read(key)

    def finder(self, prepared: Path, key: str) -> Finder:
        return Entries(_spelt(self._read(key), prepared))

    def identity(self, prepared: Path) -> str:
        return digest(self._read(str(self.path)))

    def named(self, key: str) -> str:
        return f"{key}.path: {self.path}"

    def _read(self, key: str) -> list[str]:
        if not self.path.is_file():
            raise ValueError(f"{self.named(key)} is not a file; name a text file with one entry a line")
        try:
            lines = self.path.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.named(key)} is not UTF-8 at byte {error.start}; convert the file, for example with "
                "iconv -t UTF-8"
            ) from None
        entries = [line.strip() for line in lines if line.strip()]
        if not entries:
            raise ValueError(f"{self.named(key)} is empty; write one entry a line")
        return entries


class PythonNames(Units):
    """Names of the standard library of the running Python: its modules, and the public classes that it
    defines, exceptions among them.

    Many of these names are also words (`time`, `Text`). A module's therefore counts only in an import or
    before an attribute, and a class's only with a capital, a digit or an underscore inside.
    """

    def finder(self, prepared: Path, key: str) -> Finder:
        find = Entries(_spelt(sorted(_classes()), prepared))
        return lambda text: leftmost_longest([*find(text), *_modules(text)])

    def identity(self, prepared: Path) -> str:
        return digest([*sorted(_classes()), *sorted(sys.stdlib_module_names)])


def _classes() -> set[str]:
    library = (document.text for document in PythonLibrary().documents() if document.id.endswith(".py"))
    names = {name for text in library for name in CLASS.findall(text)}
    names |= {name for name in vars(builtins) if name.endswith(("Error", "Exception", "Warning"))}
    return {name for name in names if not (name.isalpha() and name[1:].islower())}


def _modules(text: str) -> Iterator[Span]:
    for match in MODULE.finditer(text):
        group = match.lastindex or 0
        if match[group].partition(".")[0] in sys.stdlib_module_names:
            yield match.span(group)


def _is_whole(text: str, start: int, stop: int) -> bool:
    """Whether no letter goes on over either end of text[start:stop]."""
    return not any(
        0 < border < len(text) and LETTER.match(text, border - 1) and LETTER.match(text, border)
        for border in (start, stop)
    )


def _spelt(entries: Iterable[str], prepared: Path) -> list[str]:
    """The entries as their tokens spell them; without those that hold an unknown token."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    surface, unknown = Surface(tokenizer), tokenizer.token_to_id(UNKNOWN)
    encoded = [tokenizer.encode(entry, add_special_tokens=False).ids for entry in entries]
    spelt = [surface.spell(np.array(ids))[0].strip() for ids in encoded if ids and unknown not in ids]
    return [text for text in spelt if text]
