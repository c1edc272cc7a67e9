"""Parts every transformer here is made of: initialised linear maps, norms, feed-forwards, rotary positions.

Shapes: B batch, T sequence, D model width, F feed-forward width, H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # GPT-2, section 2.3 and its released code


class Linear(nn.Linear):
    """`nn.Linear` whose weight starts as normal(0, std) and whose bias starts at zero.

    The start lives in the module itself, so that a model built on the meta device, or partitioned while it is
    built (ZeRO-3), is initialised by the same `reset_parameters` and in the same order as any other.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` that starts as normal(0, std)."""

    def __init__(self, entries: int, width: int, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(entries, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


def make_norm(kind: str, width: int, bias: bool) -> nn.Module:
    """A norm over the last dimension: "layernorm" (with or without bias) or "rmsnorm" (never a bias)."""
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=1e-5)
    return nn.LayerNorm(width, eps=1e-5, bias=bias)


class GELU(nn.Module):
    """W2 gelu(W1 x) (arXiv 1606.08415, section 2), exact or by the "tanh" approximation that GPT-2 uses.

    In bfloat16 on a CPU the exact form takes about a third of the other's time (no kernel has a fast tanh).
    """

    def __init__(
        self, width: int, hidden: int, bias: bool, residual_std: float, approximate: str = "none"
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.expand = Linear(width, hidden, bias)
        self.project = Linear(hidden, width, bias, std=residual_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x_BTD), approximate=self.approximate))


class SwiGLU(nn.Module):
    """W2 (silu(W x) * V x) (arXiv 2002.05202, equation 6); W and V are one matrix product, W first."""

    def __init__(self, width: int, hidden: int, bias: bool, residual_std: float) -> None:
        super().__init__()
        self.expand = Linear(width, 2 * hidden, bias)
        self.project = Linear(hidden, width, bias, std=residual_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.expand(x_BTD).chunk(2, dim=-1)
        return self.project(F.silu(gate_BTF) * up_BTF)


def rotary_table(positions_T: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, K/2] in fp32 of RoPE (arXiv 2104.09864, equations 15 and 34).

    Computed in every forward instead of kept in a buffer: a buffer would be rounded by `.to(bfloat16)` and
    left without values by a build on the meta device.
    """
    pairs = torch.arange(0, head_width, 2, device=positions_T.device, dtype=torch.float32)
    angles = positions_T.float()[:, None] * base ** (-pairs / head_width)
    return angles.cos(), angles.sin()


def rotate(x_BTHK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + K/2) of each head by its position's angles, in fp32; returns x's dtype."""
    cos_T1K, sin_T1K = (part[:, None, :] for part in table)
    first, second = x_BTHK.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos_T1K - second * sin_T1K, second * cos_T1K + first * sin_T1K), dim=-1)
    return turned.to(x_BTHK.dtype)
