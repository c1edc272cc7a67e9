"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)."""

from __future__ import annotations

import torch

from train.optim.base import Groups, Rule, not_negative, shares


class AdamW(Rule):
    """Settings of AdamW; called with parameter groups it builds the optimizer.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    adam_like = True

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.betas = shares("betas", betas)
        self.eps = not_negative("eps", eps)

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        """The optimizer over `groups`; with `offload` on a GPU machine, DeepSpeed's vectorized CPU one."""
        if offload and torch.cuda.is_available():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(self.own(groups), betas=self.betas, eps=self.eps, adamw_mode=True)
        return torch.optim.AdamW(self.own(groups), betas=self.betas, eps=self.eps, fused=True)
