"""What of a run follows from its size: the hyperparameters, by a rule that the study names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.config import RunConfig, at, to_container

RULES = ("constant", "power", "mup")
SIZES = ("parameters", "width", "tokens", "flops")


@dataclass(frozen=True)
class Power:
    """coefficient * size ** exponent, of one of SIZES. multiple: which a whole number is rounded to."""

    of: str
    coefficient: float
    exponent: float
    multiple: int

    def at(self, sizes: Mapping[str, float], whole: bool) -> float:
        value = self.coefficient * sizes[self.of] ** self.exponent
        return max(1, round(value / self.multiple)) * self.multiple if whole else float(f"{value:.4g}")


def powers_of(node: Mapping[str, Any]) -> dict[str, Power]:
    """The power laws of a study, by the key that they set. Raises ValueError in one line."""
    found = {}
    for key, own in node.items():
        if not isinstance(own, Mapping) or set(own) - {"multiple"} != {"of", "coefficient", "exponent"}:
            raise ValueError(f"powers.{key}: is not {{of: …, coefficient: …, exponent: …}}; give these three")
        multiple = own.get("multiple", 1)
        if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
            raise ValueError(f"powers.{key}.multiple: {multiple} is no positive whole number; give one")
        if own["of"] not in SIZES:
            raise ValueError(f"powers.{key}.of: {own['of']} is none of {', '.join(SIZES)}")
        for part in ("coefficient", "exponent"):
            value = own[part]
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (part == "coefficient" and value <= 0):
                wanted = "a positive number" if part == "coefficient" else "a number"
                raise ValueError(f"powers.{key}.{part}: {value} is not {wanted}")
        found[key] = Power(own["of"], float(own["coefficient"]), float(own["exponent"]), multiple)
    return found


def check_rule(rule: str, powers: Mapping[str, Power], config: RunConfig) -> None:
    """Raises ValueError where the rule's name and what is set for it do not go together."""
    base = config.parametrization.get("base")
    if rule not in RULES:
        raise ValueError(f"rule: {rule} is none of {', '.join(RULES)}")
    if rule == "mup" and not base:
        raise ValueError("rule: mup transfers from a base size; set parametrization=mup and its base")
    if rule != "mup" and base:
        raise ValueError(
            f"rule: {rule}, but parametrization has a base; set rule=mup, or parametrization=standard"
        )
    if rule == "power" and not powers:
        raise ValueError(
            "rule: power, but powers are not given; give for example"
            " 'powers={optim.learning_rate:{of:parameters,coefficient:0.5,exponent:-0.3}}'"
        )
    if rule == "constant" and powers:
        raise ValueError("rule: constant, but powers are given; set rule=power, or powers=null")
    whole = to_container(config)
    for key in powers:
        value = at(whole, key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"powers.{key}: is no number of a run, but {value}; name a key that is one")


def values(powers: Mapping[str, Power], config: RunConfig, sizes: Mapping[str, float]) -> dict[str, float]:
    """What the power laws set for a run of these sizes; whole numbers where the config has one."""
    whole = to_container(config)
    return {key: power.at(sizes, isinstance(at(whole, key), int)) for key, power in powers.items()}
