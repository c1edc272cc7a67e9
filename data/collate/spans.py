"""Denoising for encoder-decoders: the encoder reads a text with holes, or its start, the decoder the rest.

Shapes: B batch, S inputs, T targets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from data.loader import IGNORED
from data.packing import PADDING, Sample


class Denoiser(Protocol):
    """A way to part a text into inputs and targets, both without END_OF_TEXT."""

    @property
    def share(self) -> float:
        """Targets per token of a long text, on average."""
        ...

    def longest(self, length: int) -> tuple[int, int]:
        """The most inputs and the most targets that a text of `length` >= 1 tokens becomes."""
        ...

    def spans(self, length: int) -> int:
        """How many sentinels a text of `length` tokens takes."""
        ...

    def __call__(
        self, tokens: np.ndarray, random: np.random.Generator, sentinels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of at least one token."""
        ...


@dataclass(frozen=True)
class Spans:
    """Span corruption of T5 (Raffel et al. 2019, arXiv 1910.10683, sections 3.1.4 and 3.3.4).

    Of n tokens round(rate * n) are noise, in round(noise / mean_span) spans, both exactly and at least one.
    Text and spans alternate, text first, so that a single span is the end; their lengths are uniform among
    all ways to part the text, and the noise, into that many pieces that are not empty. Inputs: each span is
    one sentinel. Targets: each span after its sentinel.
    """

    rate: float = 0.15
    mean_span: float = 3.0

    @property
    def share(self) -> float:
        spans = min(self.rate / self.mean_span, 1 - self.rate)
        return self.rate + spans

    def counts(self, length: int) -> tuple[int, int]:
        """Noise tokens and spans of a text of `length` >= 1 tokens."""
        noise = min(max(round(length * self.rate), 1), max(length - 1, 1))
        return noise, max(min(round(noise / self.mean_span), length - noise), 1)

    def spans(self, length: int) -> int:
        return self.counts(length)[1]

    def longest(self, length: int) -> tuple[int, int]:
        noise, spans = self.counts(length)
        return length - noise + spans, noise + spans

    def __call__(
        self, tokens: np.ndarray, random: np.random.Generator, sentinels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        noise, spans = self.counts(len(tokens))
        hidden, shown = _composition(noise, spans, random), _composition(len(tokens) - noise, spans, random)
        is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, np.stack([shown, hidden], axis=1).ravel())
        inputs = np.insert(tokens[~is_noise], np.cumsum(shown), sentinels[:spans])
        targets = np.insert(tokens[is_noise], np.cumsum(hidden) - hidden, sentinels[:spans])
        return inputs, targets


@dataclass(frozen=True)
class Prefix:
    """Prefix language modelling (Raffel et al. 2019, section 3.2.1): inputs are the start, targets the rest.

    rate: share of targets, on average, at most 0.5; their number is uniform from 1 to 2 * rate of the text.
    At 0.5 this is T5's uniformly random split; at 0.25 the S-denoiser of UL2 (Tay et al. 2022, table 1).
    """

    rate: float = 0.5

    @property
    def share(self) -> float:
        return self.rate

    def spans(self, length: int) -> int:
        return 0

    def longest(self, length: int) -> tuple[int, int]:
        return max(length - 1, 0), self._most(length)

    def __call__(
        self, tokens: np.ndarray, random: np.random.Generator, sentinels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        split = len(tokens) - int(random.integers(1, self._most(len(tokens)), endpoint=True))
        return tokens[:split], tokens[split:]

    def _most(self, length: int) -> int:
        return max(min(round(2 * self.rate * length), length - 1), 1)


@dataclass(frozen=True)
class Part:
    """One denoiser of a mixture. weight: its chance, relative to the others'. mode: whose token is put in
    front of the inputs and says what is asked for; None: nothing is."""

    denoiser: Denoiser
    weight: float = 1.0
    mode: str | None = None


class Denoising:
    """Each sample goes through one denoiser of a mixture (UL2: Tay et al. 2022, arXiv 2205.05131, section 3).

    Which one, and where it cuts, depends on the seed and the sample's key alone. Inputs and targets end with
    END_OF_TEXT; the decoder reads its targets behind one `pad`, which is also what padding holds.
    sequence_length: S. sentinels, modes: their ids. window: the most tokens that no denoiser makes more than
    S inputs of, so that nothing is cut; where Spans is the only one, full samples have no padding (at most
    one position where the text between spans is as short as can be). target_length: T, the longest targets
    of a window. Raises ValueError where S is too short or the sentinels are too few.
    """

    overhead = 0

    def __init__(
        self,
        sequence_length: int,
        parts: Sequence[Part],
        *,
        sentinels: Sequence[int],
        modes: Mapping[str, int],
        end_of_text: int,
        pad: int,
        seed: int,
    ) -> None:
        self.sequence_length = sequence_length
        self.parts = list(parts)
        self.window, self.target_length = lengths(sequence_length, self.parts)
        spans = max(part.denoiser.spans(self.window) for part in self.parts)
        if spans > len(sentinels):
            raise ValueError(
                f"sequence_length: {sequence_length} takes {spans} spans of noise a sample, more than the "
                f"{len(sentinels)} sentinels; shorten it, or make spans longer or fewer"
            )
        self.sentinels = np.asarray(sentinels, np.int64)
        self.modes = modes
        self.end_of_text = end_of_text
        self.pad = pad
        self.seed = seed
        weights = np.array([part.weight for part in self.parts])
        self._chances = np.cumsum(weights / weights.sum())[:-1]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """B samples -> {"inputs": int64 [B, S], "decoder" and "labels": int64 [B, T], "metric_padding": int64
        [B], the positions of inputs and decoder that hold nothing, and "documents": int32 [B, S] (0, PADDING
        for padding), where inputs are padded}.
        """
        count = len(samples)
        inputs_BS = np.full((count, self.sequence_length), self.pad, np.int64)
        decoder_BT = np.full((count, self.target_length), self.pad, np.int64)
        labels_BT = np.full((count, self.target_length), IGNORED, np.int64)
        documents_BS = np.full(inputs_BS.shape, PADDING, np.int32)
        used = np.zeros(count, np.int64)
        for row, sample in enumerate(samples):
            if not len(sample.tokens):
                continue
            inputs, targets = self._denoise(sample)
            inputs_BS[row, : len(inputs)] = inputs
            documents_BS[row, : len(inputs)] = 0
            decoder_BT[row, 1 : len(targets)] = targets[:-1]
            labels_BT[row, : len(targets)] = targets
            used[row] = len(inputs) + len(targets)
        batch = {
            "inputs": torch.from_numpy(inputs_BS),
            "decoder": torch.from_numpy(decoder_BT),
            "labels": torch.from_numpy(labels_BT),
            "metric_padding": torch.from_numpy(self.sequence_length + self.target_length - used),
        }
        if (documents_BS == PADDING).any():
            batch["documents"] = torch.from_numpy(documents_BS)
        return batch

    def _denoise(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        random = sample.random(self.seed)
        part = self.parts[int(np.searchsorted(self._chances, random.random(), side="right"))]
        inputs, targets = part.denoiser(sample.tokens, random, self.sentinels)
        front = [] if part.mode is None else [self.modes[part.mode]]
        end = np.array([self.end_of_text])
        return np.concatenate([np.array(front, np.int64), inputs, end]), np.concatenate([targets, end])


def lengths(sequence_length: int, parts: Sequence[Part]) -> tuple[int, int]:
    """The window and the target length of `Denoising`, in tokens. Raises ValueError where S is too short."""
    window = min(_window(sequence_length - 1 - (part.mode is not None), part.denoiser) for part in parts)
    if window < 2:
        raise ValueError(f"sequence_length: {sequence_length} has no room for a sample; choose more")
    return window, 1 + max(part.denoiser.longest(window)[1] for part in parts)


def _window(room: int, denoiser: Denoiser) -> int:
    """The most tokens that `denoiser` makes at most `room` inputs of; 0 where there are none."""
    return bisect_right(range(1, 2**40), room, key=lambda length: denoiser.longest(length)[0])


def _composition(total: int, pieces: int, random: np.random.Generator) -> np.ndarray:
    """int64 [pieces] of positive lengths that add up to total, each composition equally likely; one piece
    may be empty."""
    cuts = np.sort(random.choice(max(total - 1, 0), pieces - 1, replace=False, shuffle=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
