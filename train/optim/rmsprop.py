"""RMSprop (Hinton 2012, lecture 6e of "Neural Networks for Machine Learning"; Graves 2013, arXiv 1308.0850,
section 4.2)."""

from __future__ import annotations

import torch

from train.optim.base import Groups, Rule, not_negative, share


class RMSprop(Rule):
    """Settings of RMSprop.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies.
        alpha: decay of the second moment, which starts at 0 and is not corrected for it.
        momentum: of the updates.
        eps: added to the denominator.
        weight_decay: added to the gradient (L2), and so normalized with it; of matrices and embeddings only.
    """

    def __init__(
        self,
        learning_rate: float,
        alpha: float = 0.95,
        momentum: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.alpha = share("alpha", alpha)
        self.momentum = share("momentum", momentum)
        self.eps = not_negative("eps", eps)

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(self.own(groups), alpha=self.alpha, momentum=self.momentum, eps=self.eps)
