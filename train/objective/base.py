"""What an objective is: which models it fits, what its batches hold, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.loader import IGNORED, Collate
from data.packing import PADDING
from data.shards import TokenStream

METRIC = "metric_"  # tensors [B] of a batch so named are added up and logged
# The metric of what a loss sum holds besides the loss of its labels: trained on, but not part of what is
# logged as the loss per label.
AUXILIARY = "auxiliary_loss"


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

    def inputs(self, prepared: Path) -> dict[str, str]:
        """What batches depend on besides the config and the prepared data, by key: a run that finds other
        answers is another run."""
        return {}

    def used(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """How many of the batch's positions hold something, and how many there are."""
        if "documents" in batch:
            return int((batch["documents"] != PADDING).sum()), batch["documents"].numel()
        return batch["labels"].numel(), batch["labels"].numel()

    def count(self, batch: dict[str, Tensor]) -> int:
        """What the batch's loss sum is a sum over, known before the forward pass: positions with a label."""
        return int((batch["labels"] != IGNORED).sum())

    def __call__(
        self, model: Callable[..., Any], batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss sum in nats (fp32 scalar), number of labels, and further sums to log, by name."""
        return self.loss(model, batch), (batch["labels"] != IGNORED).sum(), self.metrics(batch)

    def loss(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        """Sum over the batch's labels."""
        raise NotImplementedError

    def metrics(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch's own counts, summed over its samples."""
        return {k.removeprefix(METRIC): v.sum() for k, v in batch.items() if k.startswith(METRIC)}
