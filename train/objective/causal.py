"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from data.collate.causal import Causal as CausalCollate
from data.shards import read_manifest
from train.objective.base import Objective


class Causal(Objective):
    """Cross-entropy of each token given those before it (GPT: Radford et al. 2018, eq. 1)."""

    families = ("decoder",)
    predicts_text = True

    def collator(self, prepared: Path, sequence_length: int, isolate: bool) -> CausalCollate:
        return CausalCollate(sequence_length, read_manifest(prepared)["end_of_text"], isolate)

    def used(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        return self.count(batch), batch["labels"].numel()  # all that is there is predicted

    def loss(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        return model(batch["tokens"], batch["labels"], documents_BT=batch.get("documents"))
