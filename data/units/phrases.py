"""Phrases mined on the training text, by how much more often their words meet than chance would have them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.exclusive import exclusive
from data.shards import read_manifest
from data.units.base import UNSPACED, Finder, Span, Units, digest, training_text

VERSION = 1  # of this file: raise it when the same text and settings would give other phrases
FILE = "phrases.txt"  # one a line, its words in order with a space between
SENTENCE = re.compile(r"[\w \t]+")  # words with nothing but blanks between: no phrase goes over more
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

GLUE = "\x01\x02\x03\x04"  # joins the words of a phrase while mining, a character a round; no word holds them

Phrase = tuple[str, ...]


class MinedPhrases(Units):
    """Collocations of the training text (Mikolov et al. 2013, arXiv 1310.4546, section 4), scored by
    normalised pointwise mutual information (Bouma 2009), with gensim.

    mining_bytes: how much of the beginning of the training text is looked at. min_count: how often a phrase
    occurs there at least. threshold: on the score, which is 0 for words that meet by chance and 1 for words
    that never stand apart. rounds: each joins neighbours of the one before, so that phrases have at most
    2 ** rounds words. A character of a script without spaces counts as a word.

    They are mined once for a prepared folder and kept beside it, for every rank and restart.
    """

    def __init__(
        self, mining_bytes: int = 10_000_000, min_count: int = 10, threshold: float = 0.4, rounds: int = 2
    ) -> None:
        self.mining_bytes = mining_bytes
        self.min_count = min_count
        self.threshold = threshold
        self.rounds = rounds

    def check(self, key: str) -> None:
        for name in ("mining_bytes", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{key}.{name}: {getattr(self, name)} is not positive")
        if not 1 <= self.rounds <= len(GLUE):
            raise ValueError(f"{key}.rounds: {self.rounds} is not from 1 to {len(GLUE)}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"{key}.threshold: {self.threshold} is not at least 0 and below 1")

    def identity(self, prepared: Path) -> str:
        return digest((self._target(prepared) / FILE).read_text("utf-8").split("\n"))

    def finder(self, prepared: Path, key: str) -> Finder:
        target = self._target(prepared)
        with exclusive(target, lambda folder: (folder / FILE).is_file()) as folder:
            if folder is not None:
                mined = self._mine(list(training_text(prepared, self.mining_bytes)))
                (folder / FILE).write_text("".join(f"{' '.join(phrase)}\n" for phrase in mined), "utf-8")
        lines = (target / FILE).read_text("utf-8").splitlines()
        if not lines:
            raise ValueError(
                f"{key}: nothing in the first {self.mining_bytes} bytes of {prepared.name} occurs "
                f"{self.min_count} times with a score above {self.threshold}; lower min_count or threshold"
            )
        return PhraseFinder(tuple(line.split()) for line in lines)

    def _target(self, prepared: Path) -> Path:
        """The folder of the phrases, named after all that they depend on."""
        shards = read_manifest(prepared)["splits"]["train"]["shards"]
        tokenizer = (prepared / "tokenizer" / "tokenizer.json").read_bytes()
        settings = [VERSION, self.mining_bytes, self.min_count, self.threshold, self.rounds]
        content = json.dumps([settings, shards, hashlib.sha256(tokenizer).hexdigest()])
        return prepared.parent / f"{prepared.name}-phrases-{digest([content])[:12]}"

    def _mine(self, texts: Iterable[str]) -> list[Phrase]:
        from gensim.models.phrases import Phrases  # costs a second; only the process that mines pays

        sentences = [words for text in texts for words in _sentences(text)]
        mined: set[Phrase] = set()
        for glue in GLUE[: self.rounds]:  # another one each round: the library splits what it has joined
            counted = Phrases(
                sentences,
                min_count=self.min_count,
                threshold=self.threshold,
                delimiter=glue,
                scoring="npmi",
            ).freeze()
            mined |= {tuple(re.split(f"[{GLUE}]", phrase)) for phrase in counted.phrasegrams}
            sentences = [counted[sentence] for sentence in sentences]
        return sorted(mined)


class PhraseFinder:
    """Finds phrases, from left to right the longest one, on whole words."""

    def __init__(self, phrases: Iterable[Phrase]) -> None:
        self._by_start: defaultdict[str, list[Phrase]] = defaultdict(list)
        for phrase in sorted(phrases, key=len, reverse=True):
            self._by_start[phrase[0]].append(phrase)

    def __call__(self, text: str) -> list[Span]:
        found: list[Span] = []
        for sentence in SENTENCE.finditer(text):
            places = [word.span() for word in WORD.finditer(text, *sentence.span())]
            words = tuple(text[start:stop] for start, stop in places)
            i = 0
            while i < len(words):
                candidates = self._by_start.get(words[i], ())
                length = next((len(p) for p in candidates if words[i : i + len(p)] == p), 0)
                if length:
                    found.append((places[i][0], places[i + length - 1][1]))
                i += length or 1
        return found


def _sentences(text: str) -> Iterator[list[str]]:
    """The words of each stretch that could hold a phrase."""
    for sentence in SENTENCE.findall(text):
        words = WORD.findall(sentence)
        if len(words) > 1:
            yield words
