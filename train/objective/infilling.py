"""Next-token prediction with fill-in-the-middle."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from data.collate.causal import Causal as CausalCollate
from data.collate.infill import InfillPieces
from data.infill import Infill, InfilledStream
from data.shards import TokenStream
from data.tokenizer import load_tokenizer
from train.objective.causal import Causal

Level = Literal["document", "context"]


class Infilling(Causal):
    """Cross-entropy of each token given those before it, on text of which some is rearranged so that a middle
    follows its prefix and suffix (Bavarian et al. 2022, arXiv 2207.14255; all parts keep their loss).

    rate: the chance of a document. spm_share: of these, the chance that the suffix comes first. level: where
    documents are rearranged, before they are packed, or each sample's pieces of them. Evaluation takes the
    text as it is, left to right, so that bits per byte compare with those of Causal.
    """

    def __init__(
        self, seed: int, rate: float = 0.5, spm_share: float = 0.5, level: Level = "document"
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"objective.rate: {rate} is not above 0 and at most 1; 0.5 to 0.9 costs nothing")
        if not 0 <= spm_share <= 1:
            raise ValueError(f"objective.spm_share: {spm_share} is not from 0 to 1; 0.5 mixes both orders")
        if level not in get_args(Level):
            raise ValueError(f"objective.level: {level!r} is not one of {', '.join(get_args(Level))}")
        self.seed = seed
        self.rate = rate
        self.spm_share = spm_share
        self.level = level

    def training_stream(self, prepared: Path) -> TokenStream:
        stream = super().training_stream(prepared)
        if self.level == "context":
            return stream
        tokenizer = load_tokenizer(prepared / "tokenizer")
        return InfilledStream(stream, tokenizer, self.rate, self.spm_share, self.seed)

    def collator(self, prepared: Path, sequence_length: int, isolate: bool) -> CausalCollate:
        causal = super().collator(prepared, sequence_length, isolate)
        # Here, too, at document level: a tokenizer that lacks the tokens is refused before anything starts.
        infill = Infill.of(load_tokenizer(prepared / "tokenizer"), self.rate, self.spm_share)
        if self.level == "document":
            return causal
        return InfillPieces(sequence_length, causal.end_of_text, isolate, infill=infill, seed=self.seed)
