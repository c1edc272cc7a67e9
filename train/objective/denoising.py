"""Denoising objectives of encoder-decoders: span corruption, prefix language modelling, and mixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data.collate.spans import Denoising as Collate
from data.collate.spans import Part, Prefix, Spans, lengths
from data.packing import PADDING
from data.shards import read_manifest
from data.tokenizer import PAD, SPECIAL, load_tokenizer, special_ids
from train.objective.base import Objective

MODES = tuple(token.strip("[]") for token in SPECIAL["denoisers"])
LONG = 2**16  # tokens: where rounding no longer shows in a share


class Denoising(Objective):
    """Cross-entropy of targets given inputs, both made of one text.

    predicted_share: positions with a label per input position, in long samples.
    """

    families = ("encoder-decoder",)

    def __init__(self, seed: int, parts: Sequence[Part]) -> None:
        self.seed = seed
        self.parts = list(parts)
        window, _ = lengths(LONG, self.parts)
        shares = sum(part.weight * part.denoiser.share for part in self.parts)
        self.predicted_share = shares / sum(part.weight for part in self.parts) * window / LONG

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        needed = self.target_length(model.sequence_length)
        if needed > model.target_length:
            raise ValueError(
                f"model.target_length: {model.target_length} is below the {needed} tokens that targets of"
                f" {type(self).__name__} take at sequence_length {model.sequence_length}; give {needed}"
            )

    def target_length(self, sequence_length: int) -> int:
        """The longest targets of a sample, in tokens: what model.target_length has to hold."""
        return lengths(sequence_length, self.parts)[1]

    def collator(self, prepared: Path, sequence_length: int, isolate: bool) -> Collate:
        if isolate:
            raise ValueError(
                "packing.isolate: denoising objectives run over documents, as T5 does; set it to false"
            )
        tokenizer = load_tokenizer(prepared / "tokenizer")
        corrupting = any(part.denoiser.spans(sequence_length) for part in self.parts)
        sentinels = special_ids(tokenizer, "sentinels") if corrupting else []
        asking = any(part.mode for part in self.parts)
        modes = dict(zip(MODES, special_ids(tokenizer, "denoisers"), strict=True)) if asking else {}
        end_of_text = read_manifest(prepared)["end_of_text"]
        pad = tokenizer.token_to_id(PAD)
        return Collate(
            sequence_length,
            self.parts,
            sentinels=sentinels,
            modes=modes,
            end_of_text=end_of_text,
            pad=end_of_text if pad is None else pad,
            seed=self.seed,
        )

    def used(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        inputs = batch["inputs"].numel()
        read = int((batch["documents"] != PADDING).sum()) if "documents" in batch else inputs
        return read + self.count(batch), inputs + batch["labels"].numel()

    def loss(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        documents_BS = batch.get("documents")
        return model(batch["inputs"], batch["decoder"], batch["labels"], documents_BS=documents_BS)


class SpanCorruption(Denoising):
    """T5's objective (Raffel et al. 2019, arXiv 1910.10683, sections 3.1.4 and 3.3.4).

    rate: share of a text's tokens that are noise. mean_span: tokens of a span of noise, on average.
    """

    def __init__(self, seed: int, rate: float = 0.15, mean_span: float = 3.0) -> None:
        super().__init__(seed, [Part(_spans("objective", rate, mean_span))])


class PrefixLM(Denoising):
    """The text is parted at a uniformly random point; the decoder writes what follows it (Raffel et al. 2019,
    section 3.2.1)."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, [Part(Prefix())])


class Denoisers(Denoising):
    """Mixture of denoisers (UL2: Tay et al. 2022, arXiv 2205.05131, table 1).

    denoisers: of each its `mode` (R, X: Spans, S: Prefix), `rate`, `mean_span` (not of S) and `weight` (1).
    mode_tokens: put the token of its mode in front of a sample's inputs.
    """

    def __init__(self, seed: int, denoisers: list[dict[str, Any]], mode_tokens: bool = True) -> None:
        if not denoisers:
            raise ValueError("objective.denoisers: is empty; give at least one")
        parts = [
            _part(f"objective.denoisers.{i}", settings, mode_tokens) for i, settings in enumerate(denoisers)
        ]
        super().__init__(seed, parts)


def _part(key: str, settings: Mapping[str, Any], mode_tokens: bool) -> Part:
    """A denoiser as the configuration describes it. Raises ValueError in one line that names the key."""
    mode = settings.get("mode") if isinstance(settings, Mapping) else None
    if mode not in MODES:
        raise ValueError(f"{key}.mode: {mode!r} is not one of {', '.join(MODES)}; choose one")
    needed = ("rate",) if mode == "S" else ("rate", "mean_span")
    for name in settings:
        if name not in (*needed, "mode", "weight"):
            raise ValueError(f"{key}.{name}: unknown key; mode {mode} has {', '.join(needed)} and weight")
    for name in (*needed, "weight"):
        value = settings.get(name, 1 if name == "weight" else None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}.{name}: {value!r} is not a number, which mode {mode} needs; give one")
    weight = settings.get("weight", 1)
    if not 0 < weight < float("inf"):
        raise ValueError(f"{key}.weight: {weight} is not a positive number; to drop a denoiser, take it out")
    denoiser = (
        _prefix(key, settings["rate"])
        if mode == "S"
        else _spans(key, settings["rate"], settings["mean_span"])
    )
    return Part(denoiser, weight, mode if mode_tokens else None)


def _prefix(key: str, rate: float) -> Prefix:
    if not 0 < rate <= 0.5:
        raise ValueError(f"{key}.rate: {rate} is not above 0 and at most 0.5; UL2 takes 0.25")
    return Prefix(rate)


def _spans(key: str, rate: float, mean_span: float) -> Spans:
    if not 0 < rate < 1:
        raise ValueError(f"{key}.rate: {rate} is not above 0 and below 1; T5 takes 0.15")
    if not 1 <= mean_span < float("inf"):
        raise ValueError(f"{key}.mean_span: {mean_span} is not a number of tokens from 1; T5 takes 3")
    return Spans(rate, mean_span)
