"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

import pytorch_optimizer
import torch

from train.optim.base import Groups, Rule, shares


class Lion(Rule):
    """Settings of Lion.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies: the size of every element's step.
        betas: of the interpolation whose sign is the step, and of the momentum.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    counters = ("step",)
    adam_like = True

    def __init__(
        self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.6
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.betas = shares("betas", betas)

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        return pytorch_optimizer.Lion(self.own(groups, step=0), betas=self.betas, weight_decouple=True)
