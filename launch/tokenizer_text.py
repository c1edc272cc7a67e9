"""What a tokenizer does to held-out text, without any model: how short it makes it, what it cannot spell, how
much of the vocabulary it uses, how fast it is."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.shards import TokenStream
from data.sources import Document, Source
from data.split import SplitRule
from data.tokenizer import UNKNOWN, all_special_ids, load_tokenizer

BATCH = 64  # pieces encoded at once
READ = 2**24  # tokens counted at once
LANGUAGE_CHARACTERS = 2000  # of a piece, from which its language is guessed
SPEED_BYTES = 1_000_000  # of held-out text, encoded again and again
SPEED_ROUNDS = 4  # of which the first does not count


class Sample:
    """About `bytes` bytes of another source's text, a `Source` itself.

    Where the source knows its size, pieces are chosen by a hash of their document's id and their place in it,
    so that they come from everywhere; else it is the beginning. A piece is a document of its own then.
    """

    def __init__(self, source: Source, bytes: int) -> None:
        self.source = source
        self.bytes = bytes

    def documents(self) -> Iterator[Document]:
        total = self.source.size()
        if total is None or total <= self.bytes:
            yield from self._beginning()
            return
        place = 0
        for document in self.source.documents():
            key = f"{place} {document.id}".encode("utf-8", "surrogateescape")
            # Another hash than that by which data.split.ByDocument holds documents out.
            digest = hashlib.blake2b(key, digest_size=8, person=b"sample").digest()
            if int.from_bytes(digest, "big") < self.bytes / total * 2**64:
                yield document._replace(ends=True)
            place = 0 if document.ends else place + 1

    def inputs(self) -> dict[str, Any]:
        return self.source.inputs()

    def size(self) -> int:
        return min(self.bytes, self.source.size() or self.bytes)

    def _beginning(self) -> Iterator[Document]:
        left = self.bytes
        for document in self.source.documents():
            left -= len(document.text.encode())
            yield document._replace(ends=document.ends or left <= 0)
            if left <= 0:
                return


@dataclass(frozen=True)
class Piece:
    """Held-out text, with the source and the language that it belongs to."""

    text: str
    source: str
    language: str

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Measures:
    """Of one tokenizer on the held-out text; end-of-text tokens do not count.

    by_source, by_language: bytes per token of each. spelled_share: of the bytes, those that a token stands
    for exactly. unknown_share: of the tokens. used_share: of the vocabulary without special tokens, what the
    training split holds.
    """

    bytes_per_token: float
    by_source: dict[str, float]
    by_language: dict[str, float]
    spelled_share: float
    unknown_share: float
    used_share: float


def held_out(source: Source, rule: SplitRule, most: int) -> list[Piece]:
    """The validation split, up to about `most` bytes of it."""
    guess = _language_guess()
    pieces: list[Piece] = []
    for split, document in rule.split(source):
        if split == "train":
            continue
        language = document.about.get("language") or guess(document.text)
        pieces.append(Piece(document.text, source_of(document), language))
        most -= pieces[-1].bytes
        if most <= 0:
            break
    return pieces


def source_of(document: Document) -> str:
    """Where a document says that it is from; else the first folder of its id, "." where it has none."""
    folder, slash, _ = document.id.partition("/")
    return document.about.get("source") or (folder if slash and folder else ".")


def guesses_languages() -> bool:
    """Whether the language of a document that does not tell it is guessed."""
    return importlib.util.find_spec("py3langid") is not None


def _language_guess() -> Callable[[str], str]:
    if not guesses_languages():
        return lambda text: "unknown"
    import py3langid  # loads its model, which takes a second

    return lambda text: py3langid.classify(text[:LANGUAGE_CHARACTERS])[0]


def measure(prepared: Path, pieces: Sequence[Piece]) -> Measures:
    """What the tokenizer of a prepared folder does to the pieces. Texts are encoded as in preparation."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    unknown = tokenizer.token_to_id(UNKNOWN)
    by_source, by_language = Ratios(), Ratios()
    spelled_bytes = unknowns = 0
    for first in range(0, len(pieces), BATCH):
        batch = pieces[first : first + BATCH]
        encodings = tokenizer.encode_batch([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            by_source.add(piece.source, piece.bytes, len(encoding.ids))
            by_language.add(piece.language, piece.bytes, len(encoding.ids))
            unknowns += sum(id_ == unknown for id_ in encoding.ids)
            spelled_bytes += spelled(tokenizer, piece.text, encoding)
    bytes_, tokens = by_source.bytes.total(), by_source.tokens.total()
    return Measures(
        bytes_per_token=bytes_ / tokens,
        by_source=by_source.ratios(),
        by_language=by_language.ratios(),
        spelled_share=spelled_bytes / bytes_,
        unknown_share=unknowns / tokens,
        used_share=used_share(TokenStream(prepared, "train"), all_special_ids(tokenizer)),
    )


class Ratios:
    """Bytes per token of each of several groups."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def add(self, group: str, bytes: int, tokens: int) -> None:
        self.bytes[group] += bytes
        self.tokens[group] += tokens

    def ratios(self) -> dict[str, float]:
        # A lossy tokenizer may make no token of a short text.
        return {group: size / max(self.tokens[group], 1) for group, size in self.bytes.items()}


def spelled(tokenizer: Tokenizer, text: str, encoding: Encoding) -> int:
    """Bytes of a text that come back: all, or those in whose place a token stands that spells just them."""
    if tokenizer.decode(encoding.ids, skip_special_tokens=False) == text:
        return len(text.encode())
    return sum(
        len(part.encode())
        for token, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True)
        if (part := text[start:stop]) in (token, token.removeprefix("##"))  # as WordPiece continues a word
    )


def used_share(stream: TokenStream, special: Sequence[int]) -> float:
    """The share of the vocabulary, special tokens left out, that a stream of tokens holds."""
    counts = np.zeros(stream.vocabulary_size, np.int64)
    for start in range(0, stream.tokens, READ):
        tokens = stream.read(start, min(start + READ, stream.tokens))
        counts += np.bincount(tokens, minlength=stream.vocabulary_size)
    counts[list(special)] = 0
    return int(np.count_nonzero(counts)) / (stream.vocabulary_size - len(special))


def speeds(
    tokenizers: Sequence[Tokenizer], pieces: Sequence[Piece], advance: Callable[[], object]
) -> list[tuple[float, float]]:
    """(MB/s, times the first's speed) of each tokenizer in encoding the same text with all cores.

    They take turns, so that other load falls on all of them alike: the ratio is the median of those within a
    round, the speed that of the best round. advance: called SPEED_ROUNDS times.
    """
    texts, size = [], 0
    for piece in pieces:
        texts.append(piece.text)
        size += piece.bytes
        if size >= SPEED_BYTES:
            break
    rates: list[list[float]] = []
    for _ in range(SPEED_ROUNDS):
        rates.append([size / 1e6 / _seconds(tokenizer, texts) for tokenizer in tokenizers])
        advance()
    counted = rates[1:]
    return [
        (max(rate[i] for rate in counted), median(rate[i] / rate[0] for rate in counted))
        for i in range(len(tokenizers))
    ]


def _seconds(tokenizer: Tokenizer, texts: list[str]) -> float:
    start = time.perf_counter()
    tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - start
