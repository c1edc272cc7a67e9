"""What makes the quality filters of datatrove fast, and fit for scripts without spaces.

The filters count words and their repetitions; for that, regular expressions do as well as spaCy.
"""

import logging
import re
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

# Addresses, words with what joins their parts (don't, 3.14, e.g.), and runs of the same mark.
WORD = re.compile(r"https?://\S+|\w+(?:['’.,]\w+)*|([^\w\s])\1*")
CHARACTER = re.compile(r"[a-zA-Z]+|\d+|[^\s]")
SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s|$)|[。！？]++[”’」』）]*+")
LINE_ENDS = tuple("。！？…”」』.!?\"'")
SPACELESS = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my", "bo", "dz"})  # written without spaces


class Words(WordTokenizer):
    """Splits text of a language (ISO 639); Chinese by jieba, other scripts without spaces by character."""

    def __init__(self, language: str) -> None:
        super().__init__(language)

    def __eq__(self, other: object) -> bool:  # equal ones share datatrove's cache of the last texts
        return isinstance(other, Words) and other.language == self.language

    def __hash__(self) -> int:
        return hash(self.language)

    def word_tokenize(self, text: str) -> list[str]:
        if self.language in ("zh", "yue"):
            import jieba

            jieba.setLogLevel(logging.WARNING)
            return [word for word in jieba.cut(text, HMM=False) if not word.isspace()]
        pattern = CHARACTER if self.language in SPACELESS else WORD
        return [match[0] for match in pattern.finditer(text)]

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:stop].strip() for start, stop in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(start, stop) of each sentence, in characters; white space between them belongs to the next."""
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        if text[ends[-1] if ends else 0 :].strip():
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


class LinesOfSpaceless(C4QualityFilter):
    """C4's filter, whose own terminal marks are English, for scripts without spaces."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        doc.text = "\n".join(line for line in doc.text.splitlines() if line.rstrip().endswith(LINE_ENDS))
        return super().filter(doc)


class QuickRepetition(GopherRepetitionFilter):
    """Gopher's filter, which counts repeated n-grams of six lengths only where the shortest make it worth it.

    A repeated n-gram is made of repeated 5-grams, so that its characters are among theirs.
    """

    dup_n_grams: Any

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._all = self.dup_n_grams
        self._shortest = min(n for n, _ in self._all)
        self._least = min(share for _, share in self._all)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        words = split_into_words(doc.text, self.language)
        repeated = _repeated_characters(words, self._shortest)
        self.dup_n_grams = self._all if repeated > self._least * len(doc.text) else ()
        return super().filter(doc)


def _repeated_characters(words: list[str], n: int) -> int:
    """How many characters are in n-grams of words that occurred before."""
    seen: set[tuple[str, ...]] = set()
    covered = total = 0  # words up to `covered` are counted already
    for start, gram in enumerate(zip(*(words[shift:] for shift in range(n)), strict=False)):
        if gram in seen:
            total += sum(map(len, words[max(start, covered) : start + n]))
            covered = start + n
        else:
            seen.add(gram)
    return total
