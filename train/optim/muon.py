"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982)."""

from __future__ import annotations

import torch

from train.optim.adamw import AdamW
from train.optim.base import Groups, at_least_one, share

ADJUSTMENTS = ("match_rms_adamw", "original")


class Muon(AdamW):
    """Settings of Muon for the matrices inside blocks, and of AdamW for all else.

    Args:
        learning_rate: peak learning rate of both, which the schedule multiplies.
        momentum: decay of the average of gradients that is orthogonalized.
        nesterov: Nesterov's momentum.
        iterations: of Newton and Schulz, in bf16.
        adjust: factor of the learning rate for a matrix of A rows and B columns. match_rms_adamw:
            0.2 * sqrt(max(A, B)), for steps as large as AdamW's; original: sqrt(max(1, A / B)).
        betas: AdamW's decay of the first and second moment.
        eps: added to AdamW's denominator.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    def __init__(
        self,
        learning_rate: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        adjust: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, betas, eps, weight_decay)
        self.momentum = share("momentum", momentum)
        self.nesterov = nesterov
        self.iterations = at_least_one("iterations", iterations)
        if iterations > 99:
            raise ValueError(f"optim.iterations: {iterations} is above 99; give fewer, for example 5")
        if adjust not in ADJUSTMENTS:
            raise ValueError(f"optim.adjust: {adjust!r} is unknown; give one of {', '.join(ADJUSTMENTS)}")
        self.adjust = self.matrix_scaling = adjust

    def takes_whole(self, role: str) -> bool:
        return role == "hidden"

    def whole(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            self.own(groups),
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.iterations,
            adjust_lr_fn=self.adjust,
        )
