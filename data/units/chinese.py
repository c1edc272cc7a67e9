"""Chinese words and names, by jieba: a dictionary, and a hidden Markov model for words that it lacks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.units.base import Finder, Span, Units

RUN = re.compile(r"[\w+#&.%-]+")  # what jieba cuts as one stretch
HAN = re.compile("[\u4e00-\u9fd5]")  # the characters that jieba knows
NAMES = ("nr", "ns", "nt", "nz")  # parts of speech: persons, places, organisations, other proper names


Cut = Callable[[str], Iterable[tuple[str, str]]]  # a run -> its words and their parts of speech


class Jieba(Units):
    """Words of two or more characters; a character that is a word by itself needs no unit."""

    def finder(self, prepared: Path, key: str) -> Finder:
        cut = _dictionary().cut
        return lambda text: list(_spans(text, lambda run: ((word, "") for word in cut(run)), ("",)))

    def identity(self, prepared: Path) -> str:
        return f"jieba {version('jieba')}"


class JiebaEntities(Units):
    """Words of two or more characters that jieba's part-of-speech tagger takes for NAMES.

    About ten times slower than Jieba: 10 ms for 500 characters on one core.
    """

    def finder(self, prepared: Path, key: str) -> Finder:
        cut = _tagger().cut
        return lambda text: list(_spans(text, cut, NAMES))

    def identity(self, prepared: Path) -> str:
        return f"jieba {version('jieba')}"


def _spans(text: str, cut: Cut, kinds: tuple[str, ...]) -> Iterator[Span]:
    for run in RUN.finditer(text):
        if not HAN.search(run[0]):
            continue
        start = run.start()
        for word, kind in cut(run[0]):
            stop = start + len(word)
            if len(word) > 1 and HAN.search(word) and kind.startswith(kinds):
                yield start, stop
            start = stop


@cache
def _dictionary() -> Any:
    """jieba's segmenter, loaded once a process (half a second) from the package itself: its cache, a file in
    the system's temporary folder that every process may replace, is never read or written."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about its way to find its files, which later versions of Python drop
        import jieba

    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


@cache
def _tagger() -> Any:
    from jieba.posseg import POSTokenizer

    return POSTokenizer(_dictionary())
