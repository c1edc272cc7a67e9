"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch


class AdamW:
    """Settings of AdamW; called with parameter groups it builds the optimizer.

    Args:
        learning_rate: peak learning rate, which the schedule multiplies.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled decay per unit of learning rate, of matrices and embeddings only.
    """

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if not learning_rate > 0:
            raise ValueError(f"optim.learning_rate: {learning_rate} is not positive; give a number above 0")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optim.betas: {list(betas)} are not two numbers from 0 to below 1; give two")
        for key, value in (("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"optim.{key}: {value} is negative; give 0 or more")
        self.learning_rate = float(learning_rate)
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = float(eps)
        self.weight_decay = float(weight_decay)

    def __call__(self, groups: list[dict[str, Any]], offload: bool) -> torch.optim.Optimizer:
        """The optimizer over `groups`; with `offload` on a GPU machine, DeepSpeed's vectorized CPU one."""
        settings: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "eps": self.eps}
        if offload and torch.cuda.is_available():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)
