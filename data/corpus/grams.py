"""Runs of words as numbers, to compare texts of any language by."""

import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

# Scripts without spaces: kana, and Chinese characters with their extensions.
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W_{IDEOGRAPHS}]+")
ASCII_WORD = re.compile(r"[^\W_]+", re.ASCII)
PIECE = 2**20  # characters that are cut into words at once
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; the fraction of the golden ratio


def words(text: str) -> list[str]:
    """Its words in lower case, without marks; each Chinese or Japanese character is one. Vowel signs end a
    word, as marks do, so that scripts such as Thai, which have no spaces, are cut into short pieces, too."""
    return (ASCII_WORD if text.isascii() else WORD).findall(text.lower())


def hashes(text: str) -> np.ndarray:
    """uint64 [words]: a number for each word, the same on every machine."""
    parts = []
    for start, stop in _pieces(text):
        found = words(text[start:stop])
        parts.append(np.fromiter(map(_hash, found), np.uint64, len(found)))
    return np.concatenate(parts)


def grams(numbers: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(0, words - n + 1)]: a number for each run of n words, given the numbers of the words."""
    size = max(0, len(numbers) - n + 1)
    result = np.zeros(size, np.uint64)
    for offset in range(n if size else 0):
        result *= FACTOR
        result += numbers[offset : offset + size]
    result ^= result >> np.uint64(32)
    result *= FACTOR
    result ^= result >> np.uint64(29)
    return result


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Where to cut a long text so that no word is cut, if it has spaces."""
    start = 0
    while len(text) - start > PIECE:
        space = text.rfind(" ", start, start + PIECE)
        stop = space if space > start else start + PIECE
        yield start, stop
        start = stop
    yield start, len(text)


@lru_cache(2**16)
def _hash(word: str) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(word)
