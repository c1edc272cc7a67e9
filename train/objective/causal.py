"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from data.collate.causal import Causal as CausalCollate
from data.loader import IGNORED


class Causal:
    """Cross-entropy of each token given those before it (GPT: Radford et al. 2018, eq. 1)."""

    def __init__(self) -> None:
        self.collate = CausalCollate()

    def count(self, batch: dict[str, Tensor]) -> int:
        """Tokens that carry loss, known before the forward pass."""
        return int((batch["labels"] != IGNORED).sum())

    def __call__(
        self, model: Callable[..., Any], batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of token losses in nats (fp32 scalar), number of tokens, further sums to log (none)."""
        labels = batch["labels"]
        return model(batch["tokens"], labels), (labels != IGNORED).sum(), {}
