"""Positions other than a learned table and rotary ones (see `model.rotary`).

Shapes: B batch, T queries, S keys, D model width, H heads.
"""

import math

import torch
from torch import Tensor, nn

from model.layers import Embedding


class Sinusoidal(nn.Module):
    """Sines, then cosines, of each position (arXiv 1706.03762, section 3.5).

    scaled: times a learned number that starts at D^-1/2 (as in arXiv 2202.10447).
    Computed in every forward, since a buffer would be rounded by `.to(bfloat16)`.
    """

    scale: nn.Parameter | None

    def __init__(self, width: int, scaled: bool = False) -> None:
        super().__init__()
        self.width = width
        self.register_parameter("scale", nn.Parameter(torch.empty(1)) if scaled else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.scale is not None:
            nn.init.constant_(self.scale, self.width**-0.5)

    def forward(self, positions: Tensor) -> Tensor:
        """[..., D] in fp32 of positions [...]."""
        steps = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32)
        angles = positions.float()[..., None] * 10000.0 ** (-steps / self.width)
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return waves if self.scale is None else waves * self.scale


def unseen(dtype: torch.dtype) -> float:
    """What hides a key when added to its score; finite, so that a query that sees nothing gets no NaN."""
    return torch.finfo(dtype).min / 2


class RelativeBias(Embedding):
    """A learned number for each head and bucket of distances, added to the scores (arXiv 1910.10683, section
    2.1). Near distances have a bucket each; further ones share buckets that widen in proportion, up to
    `max_distance`. Keys after the query have half of the buckets, or, if `causal`, none: they are not seen.
    """

    def __init__(self, buckets: int, max_distance: int, heads: int, causal: bool, std: float) -> None:
        super().__init__(buckets, heads, std)
        self.max_distance, self.causal = max_distance, causal

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
        """[1, H, T, S] for the positions [T] of queries and [S] of keys."""
        after_TS = keys - queries[:, None]
        bias_1HTS = super().forward(self.bucket(after_TS)).permute(2, 0, 1)[None]
        return bias_1HTS.masked_fill(after_TS > 0, unseen(bias_1HTS.dtype)) if self.causal else bias_1HTS

    def bucket(self, after: Tensor) -> Tensor:
        """The bucket of each distance, of which a positive one is that of a key after its query."""
        if self.causal:
            first, buckets, distance = 0, self.num_embeddings, (-after).clamp(min=0)
        else:
            buckets, distance = self.num_embeddings // 2, after.abs()
            first = (after > 0) * buckets  # type: ignore[assignment]
        near = buckets // 2
        widening = math.log(self.max_distance / near)
        far = near + ((distance.clamp(min=1).float() / near).log() / widening * (buckets - near)).long()
        return first + torch.where(distance < near, distance, far.clamp(max=buckets - 1))
