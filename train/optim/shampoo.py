"""Shampoo (Gupta et al. 2018, arXiv 1802.09568), as Distributed Shampoo has it (Shi et al. 2023,
2309.06497)."""

from __future__ import annotations

import pytorch_optimizer
import torch

from train.optim.base import Groups, WholeRule, at_least_one, not_negative, positive, shares


class Shampoo(WholeRule):
    """Settings of Shampoo.

    As in Distributed Shampoo, the statistics are averages, not sums; matrices are cut into blocks; and each
    block's step is as long as Adam's would be, so that it takes Adam's learning rate.

    In pytorch_optimizer (4.1.0) that is DASH. Its Shampoo has as momentum its last preconditioned step mixed
    into the next gradient, and its ScalableShampoo keeps objects as state.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies.
        betas: decay of the first moment; of the statistics and of Adam's second moment.
        block: largest dimension of a block. A statistic takes its square in memory, a root its cube in time.
        precondition_frequency: steps between renewals of the inverse roots.
        eps: added to Adam's denominator.
        matrix_eps: added to the eigenvalues of the statistics, twice.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    counters = ("step",)

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        block: int = 1024,
        precondition_frequency: int = 10,
        eps: float = 1e-8,
        matrix_eps: float = 1e-12,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.betas = shares("betas", betas)
        self.block = at_least_one("block", block)
        self.precondition_frequency = at_least_one("precondition_frequency", precondition_frequency)
        self.eps = not_negative("eps", eps)
        self.matrix_eps = positive("matrix_eps", matrix_eps)

    def whole(self, groups: Groups) -> torch.optim.Optimizer:
        return pytorch_optimizer.DASH(
            self.own(groups, step=0),
            betas=self.betas,
            block_size=self.block,
            precondition_frequency=self.precondition_frequency,
            inverse_root_method="eigh",  # the other one draws random numbers
            eps=self.eps,
            matrix_eps=self.matrix_eps,
        )
