"""What a search may choose from: one YAML, read by optuna, by a grid and by Weights & Biases alike.

conf/search/NAME.yaml gives each dotted key of a run, or group of choices, the values that it may have:

    optim.learning_rate: {low: 1e-4, high: 1e-2, log: true}
    model.layers: {low: 2, high: 6, step: 2} # whole numbers, for both ends are
    schedule.warmup: {values: [0, 0.1]}
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from optuna.trial import Trial

from launch.overrides import spelled, top

OWN = ("name", "directory", "search")  # top-level keys that are the search's own
KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
FIELDS = ("low", "high", "log", "step", "points", "values")
POINTS = 3  # of a grid between the ends of a range that names no step
DIGITS = 12  # significant ones of a value: what rounding adds to multiples of a step lies behind them

METRIC = "eval/loss"  # as train.track names it
TRAIN = ("python", "-m", "train")

Setting = dict[str, Any]  # key: value, of one run


@dataclass(frozen=True)
class Parameter:
    """A key and its values: those listed, or the range from low to high, both included.

    log: as likely in each octave. step: between neighbouring values; None: any, of whole numbers each.
    points: of a grid.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    points: int = POINTS

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are in the range."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def override(self, value: Any) -> str:
        """The argument of `python -m train` that sets it."""
        return f"{self.key}={spelled(value)}"

    def kept(self, value: Any) -> Any:
        """A value as optuna keeps it, which has no lists and dicts."""
        return spelled(value) if self.values else value

    def suggest(self, trial: Trial) -> Any:
        """What optuna chooses in a trial; what it has chosen, where it has."""
        if self.values:
            texts = [self.kept(value) for value in self.values]
            return self.values[texts.index(trial.suggest_categorical(self.key, texts))]
        if self.whole:
            step = int(self.step or 1)
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=step, log=self.log)
        return _neat(trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log))

    def grid(self) -> list[Any]:
        """Its values in a grid: each that is listed or a step away, else `points` of the range."""
        if self.values:
            return list(self.values)
        if self.step:
            return [_neat(self.low + n * self.step) for n in range(self._steps + 1)]
        shares = [n / (self.points - 1) for n in range(1, self.points - 1)]
        if self.log:
            inner = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            inner = [self.low + (self.high - self.low) * share for share in shares]
        between = [round(value) if self.whole else float(f"{value:.3g}") for value in inner]
        return [self.low, *dict.fromkeys(v for v in between if self.low < v < self.high), self.high]

    def wandb(self) -> dict[str, Any]:
        """As the parameter of a W&B sweep: those of a step, whose multiples W&B counts from 0, are listed."""
        if self.values or self.step:
            return {"values": [one if _is_number(one) else spelled(one) for one in self.grid()]}
        bounds = {"min": self.low, "max": self.high}
        if self.whole and self.log:
            return {"distribution": "q_log_uniform_values", "q": 1, **bounds}
        if self.whole:
            return {"distribution": "int_uniform", **bounds}
        return {"distribution": "log_uniform_values" if self.log else "uniform", **bounds}

    @property
    def _steps(self) -> int:
        assert self.step
        return round((self.high - self.low) / self.step)


def space(node: Mapping[str, Any]) -> list[Parameter]:
    """The parameters of a search space.

    Raises:
        ValueError: one line that names the key, what is wrong with it and what to do.
    """
    if not node:
        raise ValueError(
            "search: names no key; give for example optim.learning_rate: {low: 1e-4, high: 1e-2}"
        )
    return [_parameter(str(key), given) for key, given in node.items()]


def settings(parameters: Sequence[Parameter]) -> list[Setting]:
    """Every point of the grid over a space; the last key changes fastest."""
    keys = [one.key for one in parameters]
    points = itertools.product(*(one.grid() for one in parameters))
    return [dict(zip(keys, point, strict=True)) for point in points]


def overrides(parameters: Sequence[Parameter], setting: Setting) -> list[str]:
    """What `python -m train` is given for one point of a space."""
    return [one.override(setting[one.key]) for one in parameters]


def multirun(parameters: Sequence[Parameter], own: Sequence[str]) -> str:
    """The grid as a sweep of Hydra's: a command in a shell. own: the overrides of every run."""
    grid = [f"{one.key}={','.join(spelled(value) for value in one.grid())}" for one in parameters]
    return shlex.join([*TRAIN, "--multirun", *own, *grid]) + "\n"


def wandb(
    parameters: Sequence[Parameter], own: Sequence[str], name: str, project: str, runs: int, least: int | None
) -> str:
    """The space as the definition of a W&B sweep, in YAML, whose agents start runs with Hydra's overrides.

    own: those of every run. runs: how many are made. least: evaluations before a run may be stopped; None:
    none is. Hyperband with eta 2 stops half of the runs whenever their evaluations have doubled: of what W&B
    has, that is nearest to pruning at the median.
    """
    stop = {} if least is None else {"early_terminate": {"type": "hyperband", "min_iter": least, "eta": 2}}
    definition = {
        "program": "train",
        "name": name,
        "project": project,
        "method": "bayes",
        "metric": {"name": METRIC, "goal": "minimize"},
        "run_cap": runs,
        "parameters": {one.key: one.wandb() for one in parameters},
        **stop,
        "command": ["${env}", *TRAIN, *own, "${args_no_hyphens}"],
    }
    return yaml.safe_dump(definition, sort_keys=False, allow_unicode=True, width=110)


def _parameter(key: str, given: Any) -> Parameter:
    where = f"search.{key}"
    if not KEY.fullmatch(key) or top(key) in OWN:
        raise ValueError(f"{where}: is no key of a run that can be searched for; leave it out")
    if not isinstance(given, Mapping) or not ({"low", "high"} <= given.keys() or "values" in given):
        raise ValueError(f"{where}: {given} is neither {{low: …, high: …}} nor {{values: […]}}; give one")
    for field in given:
        if field not in FIELDS:
            raise ValueError(f"{where}.{field}: no such field; there are {', '.join(FIELDS)}")
    if "values" in given:
        return _listed(key, where, given)
    return _ranged(key, where, given)


def _listed(key: str, where: str, given: Mapping[str, Any]) -> Parameter:
    values = given["values"]
    if len(given) > 1:
        raise ValueError(
            f"{where}: has values, and {', '.join(given.keys() - {'values'})} of a range; give one"
        )
    if not isinstance(values, list) or len({spelled(value) for value in values}) < max(2, len(values)):
        raise ValueError(f"{where}.values: {values} is no list of two or more different ones; name each once")
    return Parameter(key, tuple(values))


def _ranged(key: str, where: str, given: Mapping[str, Any]) -> Parameter:
    low, high, log, step = given["low"], given["high"], given.get("log", False), given.get("step")
    points = given.get("points", POINTS)
    for field, value in (("low", low), ("high", high), *((("step", step),) if step is not None else ())):
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"{where}.{field}: {value} is not a number; give one")
    if not isinstance(log, bool):
        raise ValueError(f"{where}.log: {log} is neither true nor false")
    if not low < high:
        raise ValueError(f"{where}.high: {high} is not above low, {low}; give a larger number")
    if log and not low > 0:
        raise ValueError(f"{where}.low: {low} is not positive, as log asks for; give a number above 0")
    if not isinstance(points, int) or isinstance(points, bool) or points < 2:
        raise ValueError(f"{where}.points: {points} is not 2 or more, for both ends are points")
    found = Parameter(key, (), low, high, log, step, points)
    if step is not None:
        _check_step(where, found)
    return found


def _check_step(where: str, given: Parameter) -> None:
    step = given.step
    assert step is not None
    if given.log:
        raise ValueError(f"{where}.step: does not go with log; leave one out, or list values")
    if step <= 0 or given.whole and not isinstance(step, int):
        raise ValueError(
            f"{where}.step: {step} is not a positive number{', whole as the ends' if given.whole else ''}"
        )
    if not math.isclose(given.low + given._steps * step, given.high, rel_tol=1e-9, abs_tol=1e-9 * step):
        raise ValueError(
            f"{where}.step: high, {given.high}, is no whole number of {step} above low, {given.low}"
        )


def _neat(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
