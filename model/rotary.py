"""Rotary positions (RoPE, arXiv 2104.09864), and how they stretch to texts longer than trained on.

Shapes: B batch, T sequence, H heads, K head width, P = K/2 pairs.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from model import check

Table = tuple[Tensor, Tensor]


def linear(frequencies_P: Tensor, base: float, *, factor: float) -> tuple[Tensor, float]:
    """Positions divided by `factor` (arXiv 2306.15595, equation 4)."""
    return frequencies_P / factor, 1.0


def ntk(frequencies_P: Tensor, base: float, *, factor: float) -> tuple[Tensor, float]:
    """NTK-aware: a base so much larger that the longest wavelength grows by `factor` and the shortest stays
    (arXiv 2309.00071, definition 1).
    """
    pairs = len(frequencies_P)
    steps_P = torch.arange(pairs, device=frequencies_P.device, dtype=torch.float32)
    return frequencies_P * factor ** (-steps_P / max(1, pairs - 1)), 1.0


def yarn(
    frequencies_P: Tensor,
    base: float,
    *,
    factor: float,
    original_length: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
) -> tuple[Tensor, float]:
    """Pairs that turn at most `beta_slow` times in `original_length` positions are stretched by `factor`,
    those that turn at least `beta_fast` times are kept, and a ramp leads from one to the other (arXiv
    2309.00071, section 3.2, and its released code, which rounds the ramp's ends outwards to whole pairs).
    Queries and keys both grow by `attention_factor`, 0.1 ln(factor) + 1 unless given (section 3.4).
    """
    pairs = len(frequencies_P)

    def pair_of(turns: float) -> float:
        return pairs * math.log(original_length / (turns * 2 * math.pi)) / math.log(base)

    low = max(math.floor(pair_of(beta_fast)), 0)
    high = min(math.ceil(pair_of(beta_slow)), 2 * pairs - 1)
    steps_P = torch.arange(pairs, device=frequencies_P.device, dtype=torch.float32)
    stretched_P = ((steps_P - low) / max(high - low, 1e-3)).clamp(0, 1)
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0
    return frequencies_P * (stretched_P / factor + (1 - stretched_P)), attention_factor


def llama3(
    frequencies_P: Tensor,
    base: float,
    *,
    factor: float,
    original_length: float,
    low_frequency: float = 1.0,
    high_frequency: float = 4.0,
) -> tuple[Tensor, float]:
    """Pairs that turn at most `low_frequency` times in `original_length` positions are stretched by `factor`,
    those that turn at least `high_frequency` times are kept, those between in proportion to their turns
    (Llama 3.1's released code, models/llama3/model.py, `apply_scaling`).
    """
    turns_P = original_length * frequencies_P / (2 * math.pi)
    kept_P = ((turns_P - low_frequency) / (high_frequency - low_frequency)).clamp(0, 1)
    return frequencies_P * (kept_P + (1 - kept_P) / factor), 1.0


KINDS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "linear": linear,
    "ntk": ntk,
    "yarn": yarn,
    "llama3": llama3,
}


def check_scaling(scaling: Any) -> None:
    """Refuse anything but None or {"kind": one of KINDS, and that kind's keyword arguments}."""
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise ValueError(
            f"model.rotary_scaling: {scaling!r} is not a mapping; give kind, factor, ... or null"
        )
    check.choice("rotary_scaling.kind", scaling.get("kind"), tuple(KINDS))
    kind, given = scaling["kind"], {str(key): value for key, value in scaling.items() if key != "kind"}
    parameters = inspect.signature(KINDS[kind]).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    for key in given.keys() - known.keys():
        raise ValueError(f"model.rotary_scaling.{key}: unknown key; {kind} knows {', '.join(known)}")
    for key, default in known.items():
        if key not in given and default is inspect.Parameter.empty:
            raise ValueError(f"model.rotary_scaling.{key}: is missing; {kind} needs it")
        value = given.get(key, default)
        if value is not None or default is not None:
            smallest = 1 if key == "factor" else 0
            check.number(f"rotary_scaling.{key}", value, smallest, math.inf, include_above=smallest == 1)
    for lower, upper in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
        if lower in known and not (low := given.get(lower, known[lower])) < given.get(upper, known[upper]):
            raise ValueError(f"model.rotary_scaling.{lower}: {low} is not below {upper}; give a smaller one")


def rotary_table(
    positions: Tensor, head_width: int, base: float, scaling: Mapping[str, Any] | None = None
) -> Table:
    """Cosines and sines in fp32 (arXiv 2104.09864, equations 15 and 34) of positions [T] or [B, T]: with one
    more dimension of P. scaling: see `check_scaling`.

    Computed in every forward instead of kept in a buffer: a buffer would be rounded by `.to(bfloat16)` and
    left without values by a build on the meta device.
    """
    pairs_P = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies_P, magnitude = base ** (-pairs_P / head_width), 1.0
    if scaling is not None:
        options = {str(key): value for key, value in scaling.items() if key != "kind"}
        frequencies_P, magnitude = KINDS[scaling["kind"]](frequencies_P, base, **options)
    angles = positions.float()[..., None] * frequencies_P
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x_BTHK: Tensor, table: Table) -> Tensor:
    """Turn the pairs (i, i + K/2) of each head by its position's angles, in fp32; returns x's dtype."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    first, second = x_BTHK.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BTHK.dtype)
