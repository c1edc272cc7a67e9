"""Fill-in-the-middle at context level: of what samples hold (Bavarian et al. 2022, arXiv 2207.14255, 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data.collate.causal import Causal
from data.infill import MARKS, SHORTEST, Infill
from data.packing import Sample


class InfillPieces(Causal):
    """Next-token prediction with some pieces of each training sample rearranged; evaluation stays as it is.

    Lengths stay: a rearranged piece loses its last tokens in exchange for the inserted ones. It always ends
    with END_OF_TEXT, for which a piece cut from a longer document loses one more (section 3: that token says
    that the middle has joined the suffix, and has to be trained on), and is predicted from END_OF_TEXT, as a
    prompt is. Which pieces, and where they are parted, depends on the seed and the sample's key alone.
    """

    def __init__(
        self, sequence_length: int, end_of_text: int, isolate: bool, *, infill: Infill, seed: int
    ) -> None:
        super().__init__(sequence_length, end_of_text, isolate)
        self.infill = infill
        self.seed = seed

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """As Causal makes, and "metric_cut_tokens": int64 [B], the tokens lost."""
        pairs = [(sample, 0) if sample.step is None else self._rearranged(sample) for sample in samples]
        cut_tokens = torch.tensor([cut for _, cut in pairs], dtype=torch.int64)
        return super().__call__([sample for sample, _ in pairs]) | {"metric_cut_tokens": cut_tokens}

    def _rearranged(self, sample: Sample) -> tuple[Sample, int]:
        """The sample, and how many of its tokens were lost."""
        random = sample.random(self.seed)
        chosen = random.random(len(sample.before)) < self.infill.rate
        tokens, before, cut = sample.tokens.copy(), sample.before.copy(), 0
        end = self.end_of_text
        for piece in np.flatnonzero(chosen & (np.diff(sample.bounds) > MARKS + SHORTEST)):
            start, stop = sample.bounds[piece : piece + 2]
            text = sample.tokens[start : stop - 1 - MARKS]
            layout = self.infill.layout(len(text), random)
            parts = [text[part] if isinstance(part, slice) else [part] for part in layout]
            tokens[start:stop] = np.concatenate([*parts, [end]])
            before[piece] = end
            cut += MARKS + int(sample.tokens[stop - 1] != end)
        return replace(sample, tokens=tokens, before=before), cut
