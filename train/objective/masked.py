"""Masked language modelling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from data.collate.masked import PAIRS, UNITS, Masked
from data.loader import IGNORED
from data.shards import TokenStream
from data.tokenizer import load_tokenizer
from train.objective.base import AUXILIARY, Objective


class MaskedLM(Objective):
    """Cross-entropy of the masked tokens given all others (BERT: Devlin et al. 2018, arXiv 1810.04805,
    section 3.1); with pairs also of whether A and B belong together in this order.

    The arguments are those of data.collate.masked.Masked. BERT adds the mean loss of its pairs to the mean
    loss of its masked tokens. Sums that are divided by the number of labels come to the same where a pair
    weighs as many tokens as are expected to be masked in a sequence: rate * T.
    Raises ValueError where an argument cannot be.
    """

    families = ("encoder",)

    def __init__(
        self,
        seed: int,
        rate: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        unit: str = "token",
        ngram: int = 1,
        pairs: str | None = None,
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"objective.rate: {rate} is not above 0 and at most 1; BERT takes 0.15")
        for key, share in (("mask_share", mask_share), ("random_share", random_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"objective.{key}: {share} is not between 0 and 1")
        if mask_share + random_share > 1 + 1e-9:
            raise ValueError(
                f"objective.random_share: {random_share} and mask_share {mask_share} are more than 1 "
                "together; lower one"
            )
        if unit not in UNITS:
            raise ValueError(f"objective.unit: {unit!r} is not one of {', '.join(UNITS)}")
        if ngram < 1:
            raise ValueError(f"objective.ngram: {ngram} is below 1; 1 masks single units, ALBERT takes 3")
        if pairs not in (None, *PAIRS):
            raise ValueError(f"objective.pairs: {pairs!r} is not null or one of {', '.join(PAIRS)}")
        self.seed = seed
        self.rate = self.predicted_share = rate
        self.mask_share = mask_share
        self.random_share = random_share
        self.unit = unit
        self.ngram = ngram
        self.pairs = pairs

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        if self.pairs and not (model.pair_head and model.segments):
            raise ValueError(
                f"objective.pairs: {self.pairs} needs a model with a pair head and segments, and model"
                f" {type(model).__name__} lacks them; set model.pair_head=true model.segments=2"
            )

    def collator(self, prepared: Path, sequence_length: int, isolate: bool) -> Masked:
        streams = None
        if self.pairs == "next_sentence":
            streams = TokenStream(prepared, "train"), TokenStream(prepared, "validation")
        return Masked(
            load_tokenizer(prepared / "tokenizer"),
            sequence_length,
            seed=self.seed,
            rate=self.rate,
            mask_share=self.mask_share,
            random_share=self.random_share,
            unit=self.unit,
            ngram=self.ngram,
            pairs=self.pairs,
            streams=streams,
            isolate=isolate,
        )

    def __call__(
        self, model: Callable[..., Any], batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As Objective; with pairs also the sums AUXILIARY, pair_loss (nats), pair_correct and pairs."""
        if self.pairs is None:
            return super().__call__(model, batch)
        token_sum, logits_B2 = self._forward(model, batch, pairs=True)
        classes_B = batch["pairs"]
        pair_sum = F.cross_entropy(logits_B2.float(), classes_B, ignore_index=IGNORED, reduction="sum")
        weight = self.rate * batch["tokens"].shape[1]
        metrics = self.metrics(batch) | {
            AUXILIARY: (weight * pair_sum).detach(),
            "pair_loss": pair_sum.detach(),
            "pair_correct": (logits_B2.argmax(1) == classes_B).sum(),
            "pairs": (classes_B != IGNORED).sum(),
        }
        return token_sum + weight * pair_sum, (batch["labels"] != IGNORED).sum(), metrics

    def loss(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        return self._forward(model, batch)

    def _forward(self, model: Callable[..., Any], batch: dict[str, Tensor], **options: bool) -> Any:
        return model(
            batch["tokens"],
            batch["labels"],
            documents_BT=batch.get("documents"),
            segments_BT=batch.get("segments"),
            **options,
        )
