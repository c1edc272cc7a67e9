"""What an objective is: which models it fits, what its batches hold, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.loader import IGNORED, Collate
from data.shards import TokenStream

METRIC = "metric_"  # tensors [B] of a batch so named are added up and logged


class Objective:
    """The base of every objective.

    families: of the models that it fits. predicts_text: every token of a text is predicted once, so that nats
    add up to bits per byte. predicted_share: about how many of a sequence's positions have a label.
    """

    families: tuple[str, ...] = ()
    predicts_text = False
    predicted_share = 1.0

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError, in one line that names both, where the objective cannot train such a model."""
        if model.family not in self.families:
            raise ValueError(
                f"objective: {type(self).__name__} trains a model of family {' or '.join(self.families)}, and"
                f" model {type(model).__name__} is of family {model.family}; choose another of the two"
            )

    def training_stream(self, prepared: Path) -> TokenStream:
        """The tokens that training samples are cut from; evaluation always takes the text as it is."""
        return TokenStream(prepared, "train")

    def collator(self, prepared: Path, sequence_length: int, isolate: bool) -> Collate:
        """What makes batches of samples of a prepared folder.

        isolate: documents that share a sequence must not see each other. Raises ValueError in one line where
        the tokenizer lacks what the objective needs, or the objective cannot isolate.
        """
        raise NotImplementedError

    def count(self, batch: dict[str, Tensor]) -> int:
        """What the batch's loss sum is a sum over, known before the forward pass: positions with a label."""
        return int((batch["labels"] != IGNORED).sum())

    def __call__(
        self, model: Callable[..., Any], batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss sum in nats (fp32 scalar), number of labels, and further sums to log, by name."""
        inputs = {f"{key}": value for key, value in batch.items() if not key.startswith(METRIC)}
        return self.loss(model, inputs), (batch["labels"] != IGNORED).sum(), self.metrics(batch)

    def loss(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        """Sum over the batch's labels."""
        raise NotImplementedError

    def metrics(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch's own counts, summed over its samples."""
        return {k.removeprefix(METRIC): v.sum() for k, v in batch.items() if k.startswith(METRIC)}
