"""AdaBound (Luo et al. 2019, arXiv 1902.09843, algorithm 2)."""

from __future__ import annotations

import pytorch_optimizer
import torch

from train.optim.base import Groups, Rule, not_negative, positive, shares


class AdaBound(Rule):
    """Settings of AdaBound.

    As in the authors' code, moments are corrected for their start at 0, and steps do not shrink with the
    root of their number, which is left to the schedule. The library adds 1e-15 to the second moment besides
    `eps`.

    Args:
        learning_rate: peak learning rate of Adam's steps, which the schedule multiplies.
        final_learning_rate: of the SGD that it ends as, which the schedule multiplies too; of a group with
            another learning rate than the rule's, in proportion.
        gamma: how fast the bounds close, about 1 / steps.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    counters = ("step",)

    def __init__(
        self,
        learning_rate: float,
        final_learning_rate: float = 0.1,
        gamma: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.final_learning_rate = positive("final_learning_rate", final_learning_rate)
        self.gamma = positive("gamma", gamma)
        self.betas = shares("betas", betas)
        self.eps = not_negative("eps", eps)

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        optimizer = pytorch_optimizer.AdaBound(
            self.own(groups, step=0),
            final_lr=self.final_learning_rate,
            gamma=self.gamma,
            betas=self.betas,
            eps=self.eps,
            weight_decouple=True,
        )
        # The library looks a group's up by its place, and ZeRO steps each group as if it were the first.
        optimizer.base_lrs = [self.learning_rate] * len(groups)
        return optimizer
