"""Parts every transformer here is made of: initialised linear maps, norms, feed-forwards.

Shapes: B batch, T sequence, D model width, F feed-forward width.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # GPT-2, section 2.3 and its released code


class Linear(nn.Linear):
    """`nn.Linear` whose weight starts as normal(0, std) and whose bias starts at zero.

    The start lives in the module itself, so that a model built on the meta device, or partitioned while it is
    built (ZeRO-3), is initialised by the same `reset_parameters` and in the same order as any other.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, std: float = INIT_STD) -> None:
        self.std, self.multiplier = std, 1.0  # the second of what comes out, for a parametrization to set
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.multiplier == 1.0 else y * self.multiplier

    def spreads(self) -> list[tuple[int, float]]:
        """(rows, standard deviation that their weights start with) of each part of the outputs, in order."""
        return [(self.out_features, self.std)]

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


def make_norm(kind: str, width: int, bias: bool, eps: float = 1e-5) -> nn.Module:
    """A norm over the last dimension: "layernorm" (with or without bias) or "rmsnorm" (never a bias)."""
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=eps)
    return nn.LayerNorm(width, eps=eps, bias=bias)


class FeedForward(nn.Module):
    """W2 f(W1 x); gated W2 (f(W x) * V x) (arXiv 2002.05202, section 2), W and V in one product, W first."""

    def __init__(
        self,
        width: int,
        hidden: int,
        bias: bool,
        residual_std: float,
        *,
        function: Callable[[Tensor], Tensor],
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.function, self.gated = function, gated
        self.expand = Linear(width, 2 * hidden if gated else hidden, bias)
        self.project = Linear(hidden, width, bias, std=residual_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.gated:
            return self.project(self.function(self.expand(x_BTD)))
        gate_BTF, up_BTF = self.expand(x_BTD).chunk(2, dim=-1)
        return self.project(self.function(gate_BTF) * up_BTF)


gelu_tanh = partial(F.gelu, approximate="tanh")

# Made of (width, hidden, bias, residual_std). GELU (arXiv 1606.08415, section 2) is exact or, as in GPT-2 and
# T5 1.1, by tanh, which takes three times as long in bfloat16 on a CPU: no kernel has a fast one.
ACTIVATIONS: dict[str, Callable[[int, int, bool, float], FeedForward]] = {
    "gelu": partial(FeedForward, function=F.gelu),
    "gelu_tanh": partial(FeedForward, function=gelu_tanh),
    "relu": partial(FeedForward, function=F.relu),
    "swiglu": partial(FeedForward, function=F.silu, gated=True),
    "geglu": partial(FeedForward, function=F.gelu, gated=True),
    "geglu_tanh": partial(FeedForward, function=gelu_tanh, gated=True),
}
GATED = ("swiglu", "geglu", "geglu_tanh")
