"""SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3)."""

from __future__ import annotations

import pytorch_optimizer
import torch

from train.optim.base import Groups, WholeRule, at_least_one, not_negative, shares


class SOAP(WholeRule):
    """Settings of SOAP: Adam in the eigenbasis of Shampoo's statistics. Vectors are Adam's.

    The first step is none: it begins the statistics.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies.
        betas: decay of the first moment; of the second moment and of the statistics.
        precondition_frequency: steps between renewals of the eigenbasis.
        max_precondition_dim: a larger dimension keeps its own basis. Another takes its square in memory, and
            its cube in time at each renewal.
        eps: added to the denominator.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    counters = ("step",)

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.95, 0.95),
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.betas = shares("betas", betas)
        self.precondition_frequency = at_least_one("precondition_frequency", precondition_frequency)
        self.max_precondition_dim = at_least_one("max_precondition_dim", max_precondition_dim)
        self.eps = not_negative("eps", eps)

    def whole(self, groups: Groups) -> torch.optim.Optimizer:
        return pytorch_optimizer.SOAP(
            self.own(groups, step=0),
            betas=self.betas,
            precondition_frequency=self.precondition_frequency,
            max_precondition_dim=self.max_precondition_dim,
            eps=self.eps,
        )
