"""The blocks of an encoder-decoder, with T5's initialisation.

Shapes: B batch, S encoder inputs, T decoder inputs, D model width, H heads, K head width, F inner width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import CPU_SCORES, LayerCache, attend
from model.layers import Linear, gelu_tanh, make_norm

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # activation: its function, is it gated
    "relu": (F.relu, False),
    "geglu_tanh": (gelu_tanh, True),
    "swiglu": (F.silu, True),
}


@dataclass(frozen=True)
class Shape:
    """What all blocks of a T5 have in common; the arguments are those of `T5`."""

    width: int
    heads: int
    head_width: int
    feedforward_width: int
    norm: str
    norm_first: bool
    norm_eps: float
    activation: str
    bias: bool
    scaled_attention: bool
    dropout: float

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_width

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_width**-0.5 if self.scaled_attention else 1.0

    @property
    def query_std(self) -> float:
        """Where scores are not divided by sqrt(K), queries start so much smaller, as T5 does."""
        return self.width**-0.5 if self.scaled_attention else (self.width * self.head_width) ** -0.5

    def attend(
        self,
        q_BTHK: Tensor,
        k_BSHK: Tensor,
        v_BSHK: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
        training: bool,
    ) -> Tensor:
        """`model.attention.attend`, with the dropout of these blocks."""
        dropout = self.dropout if training else 0.0
        few = q_BTHK.shape[0] * self.heads * q_BTHK.shape[1] * k_BSHK.shape[1] <= CPU_SCORES
        plain = few and not causal and not dropout
        if plain and q_BTHK.device.type == "cpu" and q_BTHK.dtype == torch.bfloat16:
            return attend_plainly(q_BTHK, k_BSHK, v_BSHK, bias, scale)
        return attend(q_BTHK, k_BSHK, v_BSHK, causal, dropout, bias=bias, scale=scale)


def attend_plainly(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Attention by plain products, in bfloat16 on a CPU a third of SDPA's time there with a bias.

    The softmax is kept for the backward, and scores are rounded to q's dtype.
    """
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    scores = (q_BHTK if scale == 1 else q_BHTK * scale) @ k_BHSK.transpose(2, 3)
    return ((scores if bias is None else scores + bias).softmax(-1) @ v_BHSK).transpose(1, 2)


@dataclass
class BlockCache:
    """What a decoder block keeps of the tokens so far, and, from the first on, of the encoder's output."""

    own: LayerCache
    crossed: tuple[Tensor, Tensor] | None = None


class JointLinear(Linear):
    """Queries, keys and values in one product, the queries with a spread of their own."""

    def __init__(self, shape: Shape) -> None:
        self.queries, self.query_factor = shape.inner, shape.query_std * shape.width**0.5
        super().__init__(shape.width, 3 * shape.inner, shape.bias, std=shape.width**-0.5)

    def spreads(self) -> list[tuple[int, float]]:
        return [(self.queries, self.std * self.query_factor), (self.out_features - self.queries, self.std)]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.weight[: self.queries] *= self.query_factor


class SelfAttention(nn.Module):
    """Multi-head self-attention. A bias is added to the scores, and then says as well what is not seen."""

    def __init__(self, shape: Shape, causal: bool) -> None:
        super().__init__()
        self.shape, self.causal = shape, causal
        self.head_width, self.scale = shape.head_width, shape.scale
        self.qkv = JointLinear(shape)
        self.project = Linear(shape.inner, shape.width, shape.bias, std=shape.inner**-0.5)

    def forward(
        self,
        x_BTD: Tensor,
        bias: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        heads_BTHK = self.qkv(x_BTD).unflatten(-1, (-1, self.shape.head_width))
        q_BTHK, k_BTHK, v_BTHK = heads_BTHK.chunk(3, dim=2)
        if cache is not None:
            k_BTHK, v_BTHK = cache.append(k_BTHK, v_BTHK)
        causal = self.causal and bias is None
        out_BTHK = self.shape.attend(q_BTHK, k_BTHK, v_BTHK, causal, bias, self.scale, self.training)
        return self.project(out_BTHK.flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of the decoder to the encoder's output; `mask` is added to the scores."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.head_width, self.scale = shape, shape.head_width, shape.scale
        self.query = Linear(shape.width, shape.inner, shape.bias, std=shape.query_std)
        self.key_value = Linear(shape.width, 2 * shape.inner, shape.bias, std=shape.width**-0.5)
        self.project = Linear(shape.inner, shape.width, shape.bias, std=shape.inner**-0.5)

    def forward(
        self,
        x_BTD: Tensor,
        encoded_BSD: Tensor,
        mask: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        q_BTHK = self.query(x_BTD).unflatten(-1, (-1, self.shape.head_width))
        if cache is not None and cache.crossed is not None:
            k_BSHK, v_BSHK = cache.crossed
        else:
            both_BSHK = self.key_value(encoded_BSD).unflatten(-1, (-1, self.shape.head_width))
            k_BSHK, v_BSHK = both_BSHK.chunk(2, dim=2)
        if cache is not None:
            cache.crossed = k_BSHK, v_BSHK
        out_BTHK = self.shape.attend(q_BTHK, k_BSHK, v_BSHK, False, mask, self.scale, self.training)
        return self.project(out_BTHK.flatten(2))


class FeedForward(nn.Module):
    """W2 f(W1 x), or gated W2 (f(W x) * V x) with W first, with dropout of the inner layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.function, self.gated = FUNCTIONS[shape.activation]
        width, hidden = shape.width, shape.feedforward_width
        self.expand = Linear(width, 2 * hidden if self.gated else hidden, shape.bias, std=width**-0.5)
        self.project = Linear(hidden, width, shape.bias, std=hidden**-0.5)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        inner_BTF = self.expand(x_BTD)
        if self.gated:
            gate_BTF, up_BTF = inner_BTF.chunk(2, dim=-1)
            return self.project(self.dropout(self.function(gate_BTF) * up_BTF))
        return self.project(self.dropout(self.function(inner_BTF)))


class Block(nn.Module):
    """Self-attention, in a decoder attention to the encoder's output, and feed-forward, pre- or post-norm."""

    def __init__(self, shape: Shape, decoder: bool) -> None:
        super().__init__()
        self.norm_first = shape.norm_first
        norm = partial(make_norm, shape.norm, shape.width, shape.norm == "layernorm", shape.norm_eps)
        self.attention_norm, self.attention = norm(), SelfAttention(shape, causal=decoder)
        self.cross_norm = norm() if decoder else None
        self.cross = CrossAttention(shape) if decoder else None
        self.feedforward_norm, self.feedforward = norm(), FeedForward(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        bias: Tensor | None = None,
        encoded_BSD: Tensor | None = None,
        mask: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        own = None if cache is None else cache.own
        x_BTD = self._add(x_BTD, self.attention_norm, partial(self.attention, bias=bias, cache=own))
        if self.cross is not None and self.cross_norm is not None:
            cross = partial(self.cross, encoded_BSD=encoded_BSD, mask=mask, cache=cache)
            x_BTD = self._add(x_BTD, self.cross_norm, cross)
        return self._add(x_BTD, self.feedforward_norm, self.feedforward)

    def _add(self, x_BTD: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x_BTD + self.dropout(branch(norm(x_BTD)))
        return norm(x_BTD + self.dropout(branch(x_BTD)))
