"""Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682, algorithm 1)."""

from __future__ import annotations

from typing import Any

import schedulefree
import torch

from train.optim.adamw import AdamW
from train.optim.base import Groups


class ScheduleFree(AdamW):
    """Settings of Schedule-Free AdamW, to be used with `schedule=constant`, whose warm-up it weighs.

    What is stepped is the paper's y, at which gradients are taken; what is evaluated is its x, the average
    of z. As in the authors' code, and unlike in the paper, the second moment is corrected in the
    denominator, which leaves the weights of the average alone.

    Args:
        learning_rate: peak learning rate; without decay, one to ten times that of AdamW.
        betas: interpolation between z (0) and x (1), above 0; decay of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled decay of y per unit of learning rate, of matrices and embeddings only.
    """

    counters = ("k", "weight_sum", "lr_max", "scheduled_lr")
    averages = True

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, betas, eps, weight_decay)
        if not self.betas[0]:
            raise ValueError("optim.betas: the first is 0, which leaves no average; give one above 0")

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        optimizer = schedulefree.AdamWScheduleFree(self.own(groups), betas=self.betas, eps=self.eps)
        optimizer.train()
        optimizer.state.clear()  # it looked for every parameter's, and left an empty one
        return optimizer

    @torch.no_grad()
    def average(self, weights: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if state:
            weights.lerp_(state["z"], 1 - 1 / self.betas[0])
