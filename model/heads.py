"""The language-model head and its loss, computed without ever holding the whole batch's logits.

Shapes: B batch, T sequence, N = B*T tokens, C tokens of one chunk, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.layers import INIT_STD

IGNORED = -100  # a label with no loss
CHUNK_TOKENS, CHUNK_LOGITS = 1024, 2**23  # a chunk has so many of one or the other, whichever is more tokens


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden weight^T + bias)[label], gradients computed chunk by chunk in the forward.

    In the manner of Liger Kernel (arXiv 2410.10989, section 3.2): the gradient of the logits needs nothing
    from what follows but one scalar, which the backward multiplies in. The weight is read in the forward
    only, so ZeRO-3 may release it right afterwards. What has no label goes through no product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        gradients: bool,
    ) -> Tensor:
        chunk = max(CHUNK_TOKENS, CHUNK_LOGITS // weight_VD.shape[0])
        # A sum over many tokens, before any loss scale or mean, leaves the range of fp16.
        dtype = torch.float32 if hidden_ND.dtype == torch.float16 else hidden_ND.dtype
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        d_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if gradients else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if gradients else None
        d_bias_V = None
        if bias_V is not None and gradients:
            d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        for rows_C in (labels_N != IGNORED).nonzero()[:, 0].split(chunk):
            hidden_CD, target_C1 = hidden_ND[rows_C], labels_N[rows_C, None]
            log_p_CV = torch.log_softmax(F.linear(hidden_CD, weight_VD, bias_V).float(), dim=-1)
            loss -= log_p_CV.gather(1, target_C1).sum()
            if d_hidden_ND is not None and d_weight_VD is not None:
                d_CV = log_p_CV.exp_()
                d_CV.scatter_add_(1, target_C1, d_CV.new_full((1, 1), -1).expand_as(target_C1))
                if d_bias_V is not None:
                    d_bias_V += d_CV.sum(0)
                d_CV = d_CV.to(dtype)
                d_hidden_ND[rows_C] = d_CV @ weight_VD.to(dtype)
                d_weight_VD += d_CV.T @ hidden_CD.to(dtype)
        if d_hidden_ND is not None and d_weight_VD is not None:
            ctx.save_for_backward(d_hidden_ND, d_weight_VD.to(dtype), d_bias_V)
            ctx.dtype = hidden_ND.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        # A factor without dimensions keeps their dtype.
        scaled = (None if d is None else (d * d_loss).to(ctx.dtype) for d in ctx.saved_tensors)
        return (*scaled, None, None)


class LMHead(nn.Module):
    """Logits over the vocabulary, or their loss. A tied head is given the token table as weight [V, D].

    An untied weight starts as normal(0, std), a bias [V] at zero.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        vocabulary_size: int,
        width: int,
        weight: Tensor | None = None,
        bias: bool = False,
        std: float = INIT_STD,
    ) -> None:
        super().__init__()
        self.tied, self.std = weight is not None, std
        self.multiplier = 1.0  # of the logits, but for the bias, for a parametrization to set
        self.weight = nn.Parameter(torch.empty(vocabulary_size, width)) if weight is None else weight
        self.register_parameter("bias", nn.Parameter(torch.empty(vocabulary_size)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.tied:
            nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; or, with labels, the fp32 scalar sum of token losses in nats (-100: no loss)."""
        if self.multiplier != 1.0:
            hidden_BTD = hidden_BTD * self.multiplier
        if labels_BT is None:
            return F.linear(hidden_BTD, self.weight, self.bias)
        hidden_ND, labels_N = hidden_BTD.flatten(0, -2), labels_BT.flatten()
        return ChunkedCrossEntropy.apply(hidden_ND, self.weight, self.bias, labels_N, torch.is_grad_enabled())
