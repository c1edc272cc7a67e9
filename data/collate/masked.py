"""Masked language modelling: some tokens of a text are hidden, and the labels say which they were.

Shapes: B batch, T sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from tokenizers import Tokenizer

from data.collate.pairs import Elsewhere
from data.loader import IGNORED
from data.packing import PADDING, Sample
from data.shards import TokenStream
from data.surface import Surface
from data.tokenizer import END_OF_TEXT, all_special_ids, special_ids

UNITS = ("token", "word")
PAIRS = ("next_sentence", "sentence_order")
NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True)
class Framed:
    """A sequence before masking: tokens, segments and documents are int64 [n], n at most T. pair: its class.
    cut: tokens of the sample that it has no room for."""

    tokens: np.ndarray
    segments: np.ndarray
    documents: np.ndarray
    pair: int = IGNORED
    cut: int = 0


class Masked:
    """Sequences [CLS] text [SEP] of which a share of the tokens has a label (BERT: Devlin et al. 2018, arXiv
    1810.04805, section 3.1, task 1).

    sequence_length: T. rate: of a sequence's n tokens that are not special, round(rate * n) are labelled, at
    least one. mask_share of those become [MASK], random_share any token that is not special, the rest stay.
    unit: what is labelled whole, "token" or "word". Whole units are drawn until none fits what is left of the
    number, which only a unit that is longer by itself exceeds. ngram: above 1, up to so many neighbouring
    units at a time, n of them with probability proportional to 1/n (ALBERT: arXiv 1909.11942, section 4.1).
    isolate: documents see each other nowhere. Each piece of one is then framed by itself, [SEP] in place of
    its END_OF_TEXT; what has no room because of that is cut off at the end and counted.
    pairs: [CLS] A [SEP] B [SEP] out of the longest piece of a sample, cut at a word in its middle half. Half
    the time, class 1, "sentence_order" swaps A and B (ALBERT, section 3.1), and "next_sentence" takes B out
    of another document (BERT, section 3.1, task 2). A sample too short for two has no class.
    streams: where "next_sentence" finds other documents, in training and in evaluation.
    seed: what is drawn is a function of it and the sample's key, in evaluation too.
    Raises ValueError where the tokenizer, the streams or the length do not allow it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        seed: int,
        rate: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        unit: str = "token",
        ngram: int = 1,
        pairs: str | None = None,
        streams: tuple[TokenStream, TokenStream] | None = None,
        isolate: bool = False,
    ) -> None:
        if pairs and isolate:
            raise ValueError(
                f"packing.isolate: true does not go with objective.pairs={pairs}, whose sequences hold one "
                "pair each; set packing.isolate=false"
            )
        self.pad, self.cls, self.sep, self.mask = special_ids(tokenizer, "masking")
        self.end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        self.window = sequence_length - (3 if pairs else 2)
        self.overhead = 2 if isolate else 0  # [CLS] and [SEP] of each piece
        if self.window < 1 + bool(pairs):
            raise ValueError(f"sequence_length: {sequence_length} leaves no room for text; choose more")
        self.sequence_length = sequence_length
        self.seed = seed
        self.rate, self.mask_share, self.random_share = rate, mask_share, random_share
        self.unit = unit
        self.levels: tuple[str, ...] = (unit,)  # what _choose counts
        self.ngram_shares = 1 / np.arange(1, ngram + 1)
        self.pairs = pairs
        self.isolate = isolate
        self.surface = Surface(tokenizer)
        ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
        self._is_text = np.zeros(ids[-1] + 1, bool)  # by id: what may be masked
        self._is_text[ids] = True
        self._is_text[all_special_ids(tokenizer)] = False
        self._text_ids = np.flatnonzero(self._is_text)
        self._elsewhere = Elsewhere(*streams, self.surface) if pairs == "next_sentence" and streams else None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """B samples -> int64 "tokens", "labels" [B, T]; where isolated or padded int32 "documents" [B, T];
        with pairs int64 "segments" [B, T], "pairs" [B]; and counts of tokens [B]: "metric_masked_<level>",
        and "metric_cut" where tokens may be cut off."""
        shape = (len(samples), self.sequence_length)
        tokens_BT = np.full(shape, self.pad, np.int64)
        labels_BT = np.full(shape, IGNORED, np.int64)
        segments_BT = np.zeros(shape, np.int64)
        documents_BT = np.full(shape, PADDING, np.int32)
        masked = np.zeros((len(self.levels), len(samples)), np.int64)
        framed = []
        for row, sample in enumerate(samples):
            random = sample.random(self.seed)
            sequence = self._frame(sample, random)
            framed.append(sequence)
            length = len(sequence.tokens)
            places, masked[:, row] = self._choose(sequence.tokens, sample.step, random)
            labels_BT[row, places] = sequence.tokens[places]
            tokens_BT[row, :length] = sequence.tokens
            tokens_BT[row, places] = self._corrupted(sequence.tokens[places], random)
            segments_BT[row, :length] = sequence.segments
            documents_BT[row, :length] = sequence.documents
        batch: dict[str, np.ndarray] = {"tokens": tokens_BT, "labels": labels_BT}
        if self.isolate or (documents_BT == PADDING).any():
            batch["documents"] = documents_BT
        if self.pairs:
            batch |= {"segments": segments_BT, "pairs": np.array([f.pair for f in framed], np.int64)}
        batch |= {f"metric_masked_{level}": count for level, count in zip(self.levels, masked, strict=True)}
        if self.isolate or self.pairs:
            batch["metric_cut"] = np.array([f.cut for f in framed], np.int64)
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def _choose(
        self, ids: np.ndarray, step: int | None, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The positions of a framed sequence, ids [n], to label, ascending, and how many of them each of
        self.levels made. step: of training, or None."""
        free = self._is_text[ids]
        units = self._words(ids) if self.unit == "word" else np.arange(len(ids))[:, None] + [0, 1]
        special = np.concatenate([[0], np.cumsum(~free)])
        units = units[special[units[:, 0]] == special[units[:, 1]]]
        budget = max(1, round(self.rate * int(free.sum())))
        drawn = units[_draw(units, budget, self.ngram_shares, random)]
        edges = np.zeros(len(ids) + 1, np.int64)
        edges[drawn[:, 0]] += 1
        edges[drawn[:, 1]] -= 1
        places = np.flatnonzero(np.cumsum(edges))
        return places, np.array([len(places)])

    def _words(self, ids: np.ndarray) -> np.ndarray:
        """int64 [k, 2]: the stretches [start, stop) of ids that are words, or special tokens, in order."""
        edges = np.flatnonzero(np.diff(self.surface.words(ids), prepend=-2, append=-2))
        return np.stack([edges[:-1], edges[1:]], axis=1)

    def _corrupted(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """What the model is shown in place of these tokens."""
        roll = random.random(len(tokens))
        others = self._text_ids[random.integers(len(self._text_ids), size=len(tokens))]
        shown = np.where(roll < self.mask_share + self.random_share, others, tokens)
        shown[roll < self.mask_share] = self.mask
        return shown

    def _frame(self, sample: Sample, random: np.random.Generator) -> Framed:
        if not len(sample.tokens):
            return Framed(NOTHING, NOTHING, NOTHING)
        if self.isolate:
            return self._framed_pieces(sample)
        if self.pairs:
            return self._framed_pair(sample, random)
        tokens = np.concatenate([[self.cls], sample.tokens, [self.sep]])
        nothing = np.zeros(len(tokens), np.int64)
        return Framed(tokens, nothing, nothing)

    def _framed_pieces(self, sample: Sample) -> Framed:
        room, cut = self.sequence_length, 0
        pieces = []
        for start, stop in pairwise(sample.bounds):
            text = self._without_end(sample.tokens[start:stop])
            held = text[: max(room - 2, 0)]
            cut += len(text) - len(held)
            if len(held):
                pieces.append(np.concatenate([[self.cls], held, [self.sep]]))
                room -= len(pieces[-1])
        tokens = np.concatenate([NOTHING, *pieces])
        documents = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        return Framed(tokens, np.zeros(len(tokens), np.int64), documents, cut=cut)

    def _framed_pair(self, sample: Sample, random: np.random.Generator) -> Framed:
        longest = int(np.diff(sample.bounds).argmax())
        text = self._without_end(sample.tokens[sample.bounds[longest] : sample.bounds[longest + 1]])
        cut = int((sample.tokens != self.end_of_text).sum()) - len(text)
        words = np.flatnonzero(np.diff(self.surface.words(text))) + 1
        middle = words[(words >= len(text) / 4) & (words <= len(text) * 3 / 4)]
        if not len(middle):
            tokens = np.concatenate([[self.cls], text, [self.sep]])
            nothing = np.zeros(len(tokens), np.int64)
            return Framed(tokens, nothing, nothing, cut=cut)
        at = int(random.choice(middle))
        first, second, pair = text[:at], text[at:], int(random.integers(2))
        if pair and self.pairs == "sentence_order":
            first, second = second, first
        elif pair:
            assert self._elsewhere is not None, "next_sentence needs streams"
            other = self._elsewhere(text, len(second), sample.step is not None, random)
            second, pair = (other, 1) if len(other) else (second, 0)
        tokens = np.concatenate([[self.cls], first, [self.sep], second, [self.sep]])
        segments = np.repeat([0, 1], [len(first) + 2, len(second) + 1])
        return Framed(tokens, segments, np.zeros(len(tokens), np.int64), pair, cut)

    def _without_end(self, text: np.ndarray) -> np.ndarray:
        return text[:-1] if len(text) and text[-1] == self.end_of_text else text


def _draw(
    units: np.ndarray, budget: int, ngram_shares: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Which of the units, int64 [k, 2] in ascending order, to mask: at most `budget` tokens of them, in runs
    of n neighbours with a weight of ngram_shares[n - 1]. At least one unit where there is any."""
    order = random.permutation(len(units))
    sizes = 1 + np.searchsorted(np.cumsum(ngram_shares), random.random(len(units)) * ngram_shares.sum())
    lengths = np.diff(units, axis=1)[:, 0].tolist()
    follows = [False, *(units[1:, 0] == units[:-1, 1]).tolist()]
    drawn: set[int] = set()
    left = budget
    for first, size in zip(order.tolist(), sizes.tolist(), strict=True):
        if not left:
            break
        for unit in range(first, min(first + size, len(lengths))):
            if unit in drawn or lengths[unit] > left or (unit > first and not follows[unit]):
                break
            drawn.add(unit)
            left -= lengths[unit]
    return np.array(sorted(drawn), np.int64) if drawn else order[:1]
