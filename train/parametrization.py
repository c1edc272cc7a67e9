"""How initial weights, learning rates, weight decays, epsilons and multipliers follow from a model's sizes.

Hyperparameters are those of a base model; a parametrization says what becomes of them in a wider or deeper
one, so that what is best for the base stays best. The tables read as table 1 of CompleteP (arXiv 2505.01618),
whose width column is that of muP (arXiv 2203.03466, table 8): exponents of m, the width (a weight's inputs)
over that of the base, and of l, the depth over that of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.attention import Attention
from model.heads import LMHead
from model.layers import Embedding, Linear
from model.t5_block import CrossAttention, SelfAttention
from train.optim.base import Rule
from train.optim.groups import Scale, role


@dataclass(frozen=True)
class Exponents:
    """Of m in the initial spread, the peak learning rate, the weight decay and epsilon; of l in epsilon."""

    init: float
    rate: float
    decay: float
    eps: float
    eps_depth: float = 0.0


# Adam-like: every element is moved by about the learning rate, whatever the gradient's size. What a step
# decays, the product of learning rate and weight decay, does not depend on the width.
ADAM = {
    #                      init  rate  decay   eps
    "embedding": Exponents(0.0, 0.0, 0.0, -1.0),
    "hidden": Exponents(-0.5, -1.0, 1.0, -1.0, eps_depth=-1.0),
    "vector": Exponents(0.0, 0.0, 0.0, -1.0, eps_depth=-1.0),
    "head": Exponents(0.0, 0.0, 0.0, -1.0),
}
# Muon-like: a matrix of A rows and B columns is moved by the learning rate in spectral norm, times
# max(A, B) ** 0.5 where its steps are to be as large as AdamW's; else times max(1, A / B) ** 0.5, which grows
# as condition 1 of arXiv 2310.17813 asks while A / B stays as it is.
MUON = {
    "match_rms_adamw": Exponents(-0.5, -0.5, 0.5, 0.0),
    "original": Exponents(-0.5, 0.0, 0.0, 0.0),
}
# Multipliers: of a branch's output, in l; of the logits, in m; of the scores of attention beside those of the
# base, in the width of a head over that of the base.
BRANCH_DEPTH, LOGITS, SCORES = -1.0, -1.0, -1.0

ATTENTION = (Attention, SelfAttention, CrossAttention)
BLOCK = r"\.\d+(?=\.|$)"  # in the name of what is in a block, or of the block
PARTS = ("init", "rate", "decay", "eps", "branch", "logits", "scores")


class Standard:
    """Every size has the same hyperparameters."""

    base: Mapping[str, Any] = {}

    def shape(self, model: nn.Module, base: nn.Module) -> None:
        """Give a model that was built for its size the spread and the multipliers of its parametrization."""

    def scales(self, model: nn.Module, base: nn.Module, rule: Rule) -> dict[str, Scale]:
        """What becomes of a rule's hyperparameters, by the parameter's name; those left out keep them."""
        return {}


class MuP(Standard):
    """muP: hyperparameters hold at every width.

    Args:
        base: the keys of `model` in which the base model is another, with its values.
        without: of PARTS, what is left as it is in the base, to see what it was good for.
    """

    depth = False

    def __init__(self, base: Mapping[str, Any], without: Sequence[str] = ()) -> None:
        self.base = dict(base)
        if "width" not in self.base:
            raise ValueError("parametrization.base: has no width; give that of the base model")
        for key in ("layers", "decoder_layers"):
            if self.depth or key not in self.base:
                continue
            raise ValueError(
                f"parametrization.base.{key}: muP keeps the depth; leave it out, or choose"
                " parametrization=completep"
            )
        for part in without:
            if part not in PARTS:
                raise ValueError(f"parametrization.without: {part} is none of {', '.join(PARTS)}")
        self.without = frozenset(without)

    @torch.no_grad()
    def shape(self, model: nn.Module, base: nn.Module) -> None:
        logits, branch = (
            self._power("logits", _ratio(model, base, "width"), LOGITS),
            self._deeper(model, base),
        )
        for name, module, like in _pairs(model, base):
            if isinstance(module, Linear) and isinstance(like, Linear):
                self._spread(name, module, like)
                if name.endswith(".project"):
                    module.multiplier = self._power("branch", branch, BRANCH_DEPTH)
                elif name == "pair_head":
                    module.multiplier = logits
            elif isinstance(module, Embedding) and isinstance(like, Embedding):
                module.weight *= self._start(like.std, module.std)
            elif isinstance(module, LMHead) and isinstance(like, LMHead):
                if not module.tied:
                    module.weight *= self._start(like.std, module.std)
                # T5 has such a factor by itself, of another exponent.
                own = getattr(base, "head_factor", 1.0) / getattr(model, "head_factor", 1.0)
                module.multiplier = own * logits if "logits" not in self.without else 1.0
            elif isinstance(module, ATTENTION) and isinstance(like, ATTENTION):
                wider = module.head_width / like.head_width
                if "scores" not in self.without:
                    module.scale = like.scale * wider**SCORES

    def scales(self, model: nn.Module, base: nn.Module, rule: Rule) -> dict[str, Scale]:
        """As of every parametrization. Raises ValueError where there is no table for the rule."""
        own, found = dict(base.named_parameters()), {}
        width, deeper = _ratio(model, base, "width"), self._deeper(model, base)
        for name, parameter in model.named_parameters():
            kind = role(model, name, parameter)
            table = self._table(rule, kind)
            wider = parameter.shape[1] / own[_first(name)].shape[1] if kind == "hidden" else width
            inside = deeper if re.search(BLOCK, name) else 1.0
            found[name] = Scale(
                rate=self._power("rate", wider, table.rate),
                decay=self._power("decay", wider, table.decay),
                eps=self._power("eps", width, table.eps) * self._power("eps", inside, table.eps_depth),
            )
        return found

    def _table(self, rule: Rule, kind: str) -> Exponents:
        if rule.takes_whole(kind) and rule.matrix_scaling in MUON:
            return MUON[rule.matrix_scaling]
        if rule.adam_like and not rule.takes_whole(kind):
            return ADAM[kind]
        raise ValueError(
            f"parametrization: there is no table for {type(rule).__name__}'s steps; choose"
            " parametrization=standard, or a rule whose steps are like Adam's or Muon's"
        )

    def _spread(self, name: str, module: Linear, like: Linear) -> None:
        """Start a weight with the spread that its inputs ask for."""
        exponent = 0.0 if name == "pair_head" else ADAM["hidden"].init
        wider = (module.in_features / like.in_features) ** exponent
        first = 0
        for (rows, std), (_, wanted) in zip(module.spreads(), like.spreads(), strict=True):
            module.weight[first : first + rows] *= self._start(wanted * wider, std)
            first += rows

    def _start(self, wanted: float, std: float) -> float:
        return 1.0 if "init" in self.without else wanted / std

    def _deeper(self, model: nn.Module, base: nn.Module) -> float:
        return _ratio(model, base, "layers") if self.depth else 1.0

    def _power(self, part: str, ratio: float, exponent: float) -> float:
        return 1.0 if part in self.without else ratio**exponent


class CompleteP(MuP):
    """CompleteP with alpha = 1: hyperparameters hold at every width and depth."""

    depth = True

    def __init__(self, base: Mapping[str, Any], without: Sequence[str] = ()) -> None:
        super().__init__(base, without)
        if "layers" not in self.base:
            raise ValueError("parametrization.base: has no layers; give those of the base model")


def _ratio(model: nn.Module, base: nn.Module, size: str) -> float:
    return getattr(model, size) / getattr(base, size)


def _first(name: str) -> str:
    """The name of the same in the first block, which a base of any depth has."""
    return re.sub(BLOCK, ".0", name)


def _pairs(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Every module with its like in the base."""
    own = dict(base.named_modules())
    for name, module in model.named_modules():
        yield name, module, own[_first(name)]
