"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5)."""

from __future__ import annotations

import torch

from train.optim.base import Groups, WholeRule, not_negative

# PyTorch bounds the mean of the squared gradients from below by this, and the second moment by its square,
# which must not vanish in fp32. Its default of 1.2e-7 is far above the squared gradients of a language
# model.
FLOOR = 1e-18


class Adafactor(WholeRule):
    """Settings of Adafactor.

    Args:
        learning_rate: peak of the relative step size, which the schedule multiplies: a step is at most
            min(learning_rate, 1 / sqrt(step)) times the parameter's root mean square long.
        beta2_decay: exponent, 0 or below; the decay of the second moment is 1 - step ** beta2_decay.
        smallest_scale: for parameters whose root mean square is smaller, in its place.
        clip: largest root mean square of an update before it is scaled; 1 or above.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    def __init__(
        self,
        learning_rate: float,
        beta2_decay: float = -0.8,
        smallest_scale: float = 1e-3,
        clip: float = 1.0,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        if not beta2_decay <= 0:
            raise ValueError(f"optim.beta2_decay: {beta2_decay} is above 0; give 0 or below")
        if not clip >= 1:
            raise ValueError(f"optim.clip: {clip} is below 1; give 1 or above")
        self.beta2_decay, self.clip = float(beta2_decay), float(clip)
        self.smallest_scale = not_negative("smallest_scale", smallest_scale)

    def whole(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(
            self.own(groups), beta2_decay=self.beta2_decay, eps=(FLOOR, self.smallest_scale), d=self.clip
        )
