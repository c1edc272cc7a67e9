"""NAdamW: Adam with Nesterov momentum (Dozat 2016, openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ) and the
decoupled weight decay of arXiv 1711.05101."""

from __future__ import annotations

import math

import torch

from train.optim.adamw import AdamW
from train.optim.base import Groups


class NAdam(AdamW):
    """AdamW's settings, with Nesterov momentum.

    The momentum is constant, as in the NAdamW of arXiv 2306.07179. Where PyTorch (2.13) has it grow with the
    step (`momentum_decay`), it averages with another coefficient than it corrects for: what comes out is
    smaller than the paper's.
    """

    def __call__(self, groups: Groups, offload: bool) -> torch.optim.Optimizer:
        return torch.optim.NAdam(
            self.own(groups),
            betas=self.betas,
            eps=self.eps,
            momentum_decay=math.inf,  # momentum: betas[0] * (1 - 0.96 ** (step * momentum_decay) / 2)
            decoupled_weight_decay=True,
        )
