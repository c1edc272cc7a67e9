"""A study of scaling: runs of several sizes at each of several budgets, as a YAML in conf/study names them.

How many tokens a run sees follows from its budget and from what a token costs its model, counted exactly
(model.flops): as many whole steps as come nearest. Its schedule ends at that horizon. A study trains on one
data set with one tokenizer, so that its losses compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.cli import instantiate
from data.prepare import prepare
from data.shards import read_manifest
from launch.memory import Planned as Memory
from launch.overrides import as_typed, spelled, split
from launch.scaling.rules import Power, check_rule, powers_of, values
from launch.scaling.shapes import Shape, scientific, shapes_of, short
from launch.study import Planned, at_a_time
from train.config import RunConfig, check_world, micro_batch
from train.hardware import total_memory
from train.supply import check_reached, supply

# Keys of a run that the study sets by itself, and what to set instead.
OWN = {"seed": "seeds", "horizon": "budgets", "curriculum": "global_batch and sequence_length"}
LAUNCHERS = ("python", "torchrun", "slurm")
FEWEST = 10  # steps of a run
PROCESS = 600_000_000  # bytes that a rank on a CPU takes before it has a model: torch, DeepSpeed, the data


@dataclass(frozen=True)
class Expected:
    """The expected optimum: N = coefficient * C ** exponent, of all parameters and FLOP."""

    coefficient: float | None
    exponent: float


@dataclass(frozen=True)
class Study:
    """The keys of conf/scaling.yaml that are not a run's."""

    budgets: list[float]
    shapes: list[dict[str, Any]]
    nearest: int | None
    nearest_at_largest: int | None
    expected: Expected
    seeds: list[int]
    rule: str
    powers: dict[str, Any] | None
    probe: bool
    utilization: float
    peak: float | None
    launcher: str
    slurm: dict[str, Any] | None
    parallel: int | None
    trials: str

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 < budget < math.inf for budget in self.budgets):
            raise ValueError(
                f"budgets: {self.budgets} are not positive numbers of FLOP; give such as [1e15,3e15]"
            )
        if self.budgets != sorted(set(self.budgets)):
            raise ValueError(f"budgets: {self.budgets} do not increase; give each once, from the smallest")
        if len(self.shapes) < 2:
            raise ValueError(
                f"shapes: {self.shapes} are not two or more; give some as {{width: 64, heads: 4}}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} are not one or more different ones")
        for key in ("nearest", "nearest_at_largest", "parallel"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value} is not positive; give a larger number")
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher: {self.launcher} is none of {', '.join(LAUNCHERS)}")
        if self.probe and self.launcher == "slurm":
            raise ValueError("probe: measures on this machine; with launcher=slurm, set probe=false and peak")
        if self.peak is not None and not 0 < self.peak < math.inf:
            raise ValueError(f"peak: {self.peak} is not a positive number of FLOP/s; give such as 1e15")
        if not 0 < self.utilization <= 1:
            raise ValueError(
                f"utilization: {self.utilization} is no share of the peak; give one above 0 up to 1"
            )
        chooses = self.nearest is not None or self.nearest_at_largest is not None
        if chooses and not (self.expected.coefficient and self.expected.coefficient > 0):
            raise ValueError(
                "expected.coefficient: must be set for nearest to count from, above 0: about parameters /"
                " budget ** expected.exponent of the best size of a budget"
            )

    def chosen(self, budget: float, shapes: Sequence[Shape]) -> list[Shape]:
        """Those that are trained with a budget, in their order."""
        largest = budget == self.budgets[-1]
        most = self.nearest_at_largest if largest and self.nearest_at_largest else self.nearest
        if most is None:
            return list(shapes)
        assert self.expected.coefficient is not None
        wanted = math.log(self.expected.coefficient) + self.expected.exponent * math.log(budget)
        distance = [abs(math.log(shape.counts.parameters) - wanted) for shape in shapes]
        nearest = sorted(range(len(shapes)), key=lambda index: distance[index])[:most]
        return [shapes[index] for index in sorted(nearest)]


@dataclass(frozen=True)
class Sized:
    """A run of the plan. given: what its rule set. steps: of its horizon."""

    planned: Planned
    config: RunConfig
    budget: float
    shape: Shape
    given: dict[str, float]
    steps: int

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def parameters(self) -> int:
        return self.shape.counts.parameters

    @property
    def tokens(self) -> int:
        """Trained on."""
        return self.steps * self.config.global_batch * self.config.sequence_length

    @property
    def step(self) -> tuple[int, int, int, int | None]:
        """What the time and memory of a step depend on."""
        config = self.config
        return self.parameters, config.global_batch, config.sequence_length, config.micro_batch

    @property
    def flops(self) -> int:
        return self.tokens * self.shape.counts.training_flops_per_token


@dataclass(frozen=True)
class Plan:
    """All runs of a study, by budget, size and seed. prepared: the data. unique: training tokens that it has;
    None where it is a stream, whose end nobody knows. memory: bytes that a rank of each run allocates."""

    study: Study
    runs: list[Sized]
    prepared: Path
    unique: int | None
    memory: list[int]

    @property
    def at_once(self) -> int:
        """Runs beside each other."""
        if self.study.parallel or self.study.launcher == "slurm":
            return self.study.parallel or len(self.runs)
        return max(1, min(self.in_memory, *(at_a_time(run.config) for run in self.runs)))

    @property
    def in_memory(self) -> int:
        """Runs whose memory this machine has; of GPUs, which are no two runs', any number or none."""
        if torch.cuda.is_available():
            return len(self.runs) if max(self.memory) <= total_memory() else 0
        ranks = max(run.config.engine.ranks or 1 for run in self.runs)
        return total_memory() // (ranks * self.most)

    @property
    def most(self) -> int:
        """Bytes that a rank takes at most, on a CPU with its process."""
        return max(self.memory) + (0 if torch.cuda.is_available() else PROCESS)

    def epochs(self, run: Sized) -> float | None:
        """How often a run sees its data."""
        return None if self.unique is None else run.tokens / self.unique


def plan_of(node: DictConfig) -> Plan:
    """The plan that a composed conf/scaling.yaml asks for. Prepares its data.

    Raises ValueError in one line on what is wrong with a key, a size or the data.
    """
    study, run_node = split(node, Study)
    if run_node.get("curriculum"):
        raise ValueError(
            "curriculum: the steps of a study's runs are alike; set global_batch and sequence_length"
        )
    typed = as_typed(run_node, without=(*OWN, "name", "directory"))
    first = Planned("first", tuple(typed)).config()
    powers = powers_of(study.powers or {})
    check_rule(study.rule, powers, first)
    prepared = prepare(OmegaConf.create(first.data), OmegaConf.create(first.tokenizer))
    objective = instantiate(first.objective, "objective")
    vocabulary = read_manifest(prepared)["vocabulary_size"]
    shapes = shapes_of(study.shapes, typed, vocabulary, objective.predicted_share)
    runs = [
        _sized(study, typed, powers, budget, shape, seed)
        for budget in study.budgets
        for shape in study.chosen(budget, shapes)
        for seed in study.seeds
    ]
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"shapes: two are so near to each other that both are called {twice}; leave one out")
    for run in runs:
        schedule = instantiate(run.config.schedule, "schedule")
        try:
            check_reached(run.config, objective, schedule, run.steps)
        except ValueError as error:
            raise ValueError(f"budgets: {run.name}: {error}") from None
    samples = getattr(supply(runs[0].config, objective, prepared).packing, "samples", None)
    gpu = torch.cuda.is_available() or study.launcher == "slurm"
    memory = _memory(runs, vocabulary, gpu)
    return Plan(study, runs, prepared, samples and samples * first.sequence_length, memory)


def _memory(runs: Sequence[Sized], vocabulary: int, gpu: bool) -> list[int]:
    """Bytes that a rank allocates at its fullest moment, as `python -m launch.plan` counts them."""
    found: dict[tuple[int, int, int, int | None], int] = {}
    for run in runs:
        if run.step not in found:
            ranks = run.config.engine.ranks or 1
            memory = Memory(run.config, ranks, vocabulary, gpu).at(micro_batch(run.config, ranks))
            found[run.step] = memory.peak
    return [found[run.step] for run in runs]


def _sized(
    study: Study, typed: Sequence[str], powers: dict[str, Power], budget: float, shape: Shape, seed: int
) -> Sized:
    """Raises ValueError where the budget is too small for the size."""
    counts = shape.counts
    name = f"{scientific(budget)}-{short(counts.parameters)}"
    if len(study.seeds) > 1:
        name += f"-seed{seed}"
    own = *typed, *shape.overrides, f"seed={seed}"
    config = Planned(name, own).config()
    for key, power in powers.items():
        if power.of == "width" and "width" not in config.model:
            raise ValueError(f"powers.{key}.of: width, which the model has not; give parameters")
    sizes = {
        "parameters": counts.parameters,
        "width": config.model.get("width", math.nan),
        "tokens": budget / counts.training_flops_per_token,
        "flops": budget,
    }
    given = values(powers, config, sizes)
    ruled = *own, *(f"{key}={spelled(value)}" for key, value in given.items())
    config = Planned(name, ruled).config()
    check_world(config, config.engine.ranks or 1)
    step = counts.training_flops_per_token * config.global_batch * config.sequence_length
    steps = round(budget / step)
    if steps < FEWEST:
        raise ValueError(
            f"shapes: {name}: {shape} makes {budget / step:.2g} steps of {scientific(step)} FLOP with this"
            f" budget, and {FEWEST} are the fewest; leave it out there (nearest), make steps smaller, or"
            " budgets larger"
        )
    horizon = f"horizon.steps={steps}", "horizon.tokens=null", "horizon.epochs=null"
    planned = Planned(name, (*ruled, *horizon))
    return Sized(planned, planned.config(), budget, shape, given, steps)
