"""What a sequence of tokens spells, character by character, and which tokens make up a word.

A tokenizer decodes a sequence as a whole; masking needs to know which token each character came from. So
every token's piece of text is written down once, in bytes, because a byte-level token may end inside a
character.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.tokenizer import ALPHABET, all_special_ids, vocabulary_size

PLACEHOLDER = "\ufffc"  # what a special token spells: no letter, no white space, and in no one's text
REPLACEMENT = "\ufffd"  # what a byte spells that is part of no character

# Byte-level tokens are written with a character per byte: bytes that print stand for themselves, the others
# for the characters from 256 on, in order.
BYTES = {chr(byte): bytes([byte]) for byte in range(256) if chr(byte) in ALPHABET}
UNPRINTED = [byte for byte in range(256) if chr(byte) not in BYTES]
BYTES |= {chr(256 + i): bytes([byte]) for i, byte in enumerate(UNPRINTED)}

SPACE, LETTER, OTHER, CJK, JOINER = range(5)  # kinds of characters
MARKS = (*range(0x1F000), *range(0xE0000, 0xE0200))  # among these are all marks
# The blocks that BERT's tokenizer takes apart (Devlin et al. 2018, BasicTokenizer): ideographs, but no kana
# and no Hangul, which are written in words.
CJK_BLOCKS = [
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
]


class Surface:
    """The text behind token ids of one tokenizer.

    Knows the pieces of byte-level tokenizers, WordPiece, single characters, and of a tokenizer made elsewhere
    what its decoder says (the signs that SentencePiece and others write for spaces and bytes).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = _pieces(tokenizer)
        special = all_special_ids(tokenizer)
        for id_ in special:
            pieces[id_] = PLACEHOLDER.encode()
        decoders = _decoders(tokenizer)
        prefix = next((d["prefix"] for d in decoders if d["type"] == "WordPiece"), None)
        self._spaced = prefix is not None or not decoders  # without a decoder, tokens are words
        if self._spaced:
            mark = (prefix or " ").encode()  # no token begins with a space
            texts = [piece.removeprefix(mark).decode() for piece in pieces]
            self._continues = np.array([piece.startswith(mark) for piece in pieces])
            self._opens_cjk = np.array([_is_cjk(text[:1]) for text in texts])
            self._closes_cjk = np.array([_is_cjk(text[-1:]) for text in texts])
            pieces = [f"{space}{text}".encode() for space in ("", " ") for text in texts]
        self._pieces = pieces
        self._lengths = np.array([len(piece) for piece in pieces])
        self._special = np.zeros(vocabulary_size(tokenizer), bool)
        self._special[special] = True

    def spell(self, ids: np.ndarray) -> tuple[str, np.ndarray]:
        """Ids [n] -> the text they spell, and int64 [len(text)], ascending: which id each character is of.

        A character of several tokens is of the one with its first byte. Between tokens of WordPiece stands a
        space, but for continued words and between CJK characters; it is of the token after it. A special
        token spells PLACEHOLDER, a byte of no character REPLACEMENT.
        """
        text, _, owner = self._spell(ids)
        return text, owner

    def words(self, ids: np.ndarray) -> np.ndarray:
        """Ids [n] -> int64 [n]: a number per word, the same for all its tokens, ascending; -1: special.

        A word is a run of letters, digits, "_" and the marks on them, one CJK character, or one
        other visible character, and the white space before it. Words that share a token are one.
        """
        text, codes, owner = self._spell(ids)
        special = self._special[ids]
        begins = self._word_starts(codes)
        first = np.searchsorted(owner, np.arange(len(ids)))  # each token's first character, if it has one
        spells = np.diff(first, append=len(owner)) > 0
        space = _kinds()[codes] == SPACE
        visible = np.zeros(len(ids), bool)
        visible[owner[~space]] = True
        begins[1:] |= (
            space[:-1] & visible[owner[:-1]]
        )  # a space at the end of a token is of that token's word
        cuts = np.zeros(len(ids), bool)
        cuts[spells] = begins[first[spells]]
        cuts[special] = True
        cuts[1:] |= special[:-1]
        words = np.cumsum(cuts) - (1 if len(ids) and cuts[0] else 0)
        words[special] = -1
        return words

    def _spell(self, ids: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
        """The text, the code points of its characters, and whose they are."""
        keys = ids.astype(np.int64)
        if self._spaced and len(ids):
            joined = self._closes_cjk[ids[:-1]] & self._opens_cjk[ids[1:]]
            keys[1:] += len(self._continues) * ~(self._continues[ids[1:]] | joined)
        pieces = self._pieces
        raw = b"".join([pieces[key] for key in keys.tolist()])
        # Python's U+DC80 ... U+DCFF for a byte of no character: one for one, so that bytes can be counted.
        text = raw.decode(errors="surrogateescape")
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        lone = (codes >= 0xDC80) & (codes <= 0xDCFF)
        sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        sizes[lone] = 1
        if lone.any():
            codes = np.where(lone, np.uint32(ord(REPLACEMENT)), codes)
            text = codes.tobytes().decode("utf-32-le")
        owner = np.repeat(np.arange(len(ids)), self._lengths[keys])[np.cumsum(sizes) - sizes]
        return text, codes, owner

    def _word_starts(self, codes: np.ndarray) -> np.ndarray:
        """bool [len(codes)]: where a word, with the white space before it, begins."""
        kinds = _kinds()[codes]
        joins = kinds == JOINER
        if joins.any():  # a mark is part of whatever it stands on
            kinds = kinds[np.maximum.accumulate(np.where(joins, 0, np.arange(len(kinds))))]
        before = np.concatenate([[OTHER], kinds[:-1]])
        return (before != SPACE) & ~((kinds == LETTER) & (before == LETTER)) & ~joins


def _pieces(tokenizer: Tokenizer) -> list[bytes]:
    """What each id spells, as the tokenizer's decoder reads its token; nothing where there is no token."""
    decoders = _decoders(tokenizer)
    kinds = {decoder["type"] for decoder in decoders}
    signs = {d["replacement"]: " " for d in decoders if d["type"] == "Metaspace"}
    signs |= {d["suffix"]: " " for d in decoders if d["type"] == "BPEDecoder"}
    replaced = [d for d in decoders if d["type"] == "Replace" and "String" in d["pattern"]]
    signs |= {d["pattern"]["String"]: d["content"] for d in replaced}
    added = tokenizer.get_added_tokens_decoder()
    pieces = [b""] * vocabulary_size(tokenizer)
    for token, id_ in tokenizer.get_vocab(with_added_tokens=True).items():
        if id_ in added:
            pieces[id_] = token.encode()
        elif "ByteLevel" in kinds:
            pieces[id_] = b"".join([BYTES.get(character) or character.encode() for character in token])
        elif "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            pieces[id_] = bytes([int(token[3:5], 16)])
        else:
            for sign, text in signs.items():
                token = token.replace(sign, text)
            pieces[id_] = token.encode()
    return pieces


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The settings of the tokenizer's decoder, step by step."""
    if tokenizer.decoder is None:
        return []
    settings = json.loads(tokenizer.decoder.__getstate__())
    return settings["decoders"] if settings["type"] == "Sequence" else [settings]


def _is_cjk(character: str) -> bool:
    return bool(character) and any(first <= ord(character) <= last for first, last in CJK_BLOCKS)


@cache
def _kinds() -> np.ndarray:
    """uint8 [0x110000]: the kind of every code point."""
    kinds = np.full(sys.maxunicode + 1, OTHER, np.uint8)
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    for pattern, kind in ((r"\w+", LETTER), (r"\s+", SPACE)):
        for run in re.finditer(pattern, text):
            kinds[run.start() : run.end()] = kind
    for first, last in CJK_BLOCKS:
        kinds[first : last + 1] = CJK
    marks = [code for code in MARKS if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me")]
    kinds[[*marks, *map(ord, "\u200c\u200d")]] = JOINER
    return kinds
