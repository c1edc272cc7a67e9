"""Stochastic gradient descent with momentum (Polyak 1964; Nesterov's as in Sutskever et al. 2013, "On the
importance of initialization and momentum in deep learning")."""

from __future__ import annotations

import torch

from train.optim.base import Groups, Rule, share


class SGD(Rule):
    """Settings of SGD.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies.
        momentum: share of the update that is left in the next one.
        nesterov: Nesterov's momentum.
        weight_decay: added to the gradient (L2), of matrices and embeddings only.
    """

    def __init__(
        self,
        learning_rate: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.momentum = share("momentum", momentum)
        self.nesterov = nesterov
        self.keeps_state = self.momentum > 0
        if nesterov and not momentum:
            raise ValueError("optim.nesterov: needs momentum; set optim.momentum above 0")

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.own(groups), momentum=self.momentum, nesterov=self.nesterov)
