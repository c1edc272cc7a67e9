"""How much text there is: documents, bytes of UTF-8 and tokens.

Before there is a vocabulary, a token is a piece of GPT-2's pre-tokenizer (Radford et al. 2019; ByteLevel of
the tokenizers library): a word or a number with the space before it, or a run of marks or of white space.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

import numpy as np

Counts = dict[str, int]
PIECE = 2**20  # characters counted at once: memory stays small, however long a text is
COUNTS = ("documents", "bytes", "tokens")
MARK, LETTER, NUMBER, SPACE, BLANK = range(5)  # BLANK: white space that is not the space itself
BLANKS = "\t\n\v\f\r\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
BLANKS += "\u2028\u2029\u202f\u205f\u3000"
# 's, 't and so on are one piece where a mark or a space before does not take the apostrophe. That makes one
# piece less than the runs of characters are, unless more letters follow.
CONTRACTION = re.compile(r"'(?<![^\w\s]')(?<![ _]')(?:s|t|re|ve|m|ll|d)")


def none() -> Counts:
    return dict.fromkeys(COUNTS, 0)


def total(parts: Iterable[Counts]) -> Counts:
    result = none()
    for part in parts:
        for unit in COUNTS:
            result[unit] += part[unit]
    return result


def tokens(text: str) -> int:
    """How many pieces GPT-2's pre-tokenizer makes of a text, counted by changes of the kind of character.

    Of a long text it may count one too many for every PIECE. The libraries that make the pieces take ten to
    thirty times as long, as much as cleaning the text does.
    """
    if len(text) > PIECE:
        return sum(tokens(text[start : start + PIECE]) for start in range(0, len(text), PIECE))
    if not text:
        return 0
    if text.isascii():
        kinds = np.frombuffer(text.encode().translate(_kinds_of_bytes()), np.uint8)
    else:
        kinds = _kinds().take(np.frombuffer(text.encode("utf-32-le"), np.uint32))
    visible = kinds < SPACE
    runs = int(visible[0]) + np.count_nonzero(visible[1:] & (kinds[1:] != kinds[:-1]))
    # The last character of white space stands alone, a space with what follows it; those before are a piece.
    last = np.flatnonzero(~visible[:-1] & visible[1:])
    blanks = np.count_nonzero(kinds[last] == BLANK) + np.count_nonzero(~visible[last[last > 0] - 1])
    contracted = sum(
        not text[found.end() : found.end() + 1].isalpha() for found in CONTRACTION.finditer(text)
    )
    return int(runs + blanks + (not visible[-1]) - contracted)


@cache
def _kinds_of_bytes() -> bytes:
    return bytes(_kind(chr(code)) for code in range(256))


@cache
def _kinds() -> np.ndarray:
    """uint8 [0x110000]: the kind of every character; takes a fifth of a second and a megabyte, once."""
    return np.fromiter((_kind(chr(code)) for code in range(0x110000)), np.uint8, 0x110000)


def _kind(character: str) -> int:
    category = unicodedata.category(character)[0]
    if category in "LN":
        return LETTER if category == "L" else NUMBER
    return SPACE if character == " " else BLANK if character in BLANKS else MARK
