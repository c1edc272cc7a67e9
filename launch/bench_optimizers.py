"""What does each optimizer's own work cost, beside the step that it is part of?

    python -m launch.bench_optimizers [--rules adamw muon …] [--steps 20] [--shape small|large] [--json FILE]

Every rule of conf/optim trains a model of launch.bench in the engine, step by step in turn, so that other
load falls on all alike. Timed are the whole step, and within it DeepSpeed's `step`: norm, clipping, the rule,
and the weights cast back. Beside that stand the matrix products that the rule makes, counted by PyTorch as it
makes them, as a share of the model's FLOP, and what its paper says they are:

Muon   `iterations` of 2 (2 n m^2 + m^3) for a matrix of m rows and n columns, m <= n (Jordan et al. 2024,
       "Runtime analysis"); so their share is at most iterations * m / tokens of a step.
SOAP   8 (m^2 n + m n^2): statistics, and three changes of basis (arXiv 2409.11321, algorithm 3); those of the
       side alone whose basis is its own. Renewals of the basis come besides.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from omegaconf import OmegaConf
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.cli import instantiate, main_guard
from data.files import write
from data.loader import Batch
from launch.bench_data import prepare_library
from launch.bench_training import ENGINE as OURS
from launch.bench_training import LARGE, PRECISIONS, SMALL, ZERO_STAGE, Shape, build, make_loader
from launch.request import CONF
from model.flops import count
from train.config import EngineConfig, Horizon, RunConfig
from train.engine import Engine, World, start_world, stop_world
from train.hardware import device_name
from train.objective.causal import Causal
from train.optim.base import Rule
from train.optim.groups import parameter_groups, role
from train.optim.muon import Muon
from train.optim.soap import SOAP

SHAPES = {shape.name: shape for shape in (SMALL, LARGE)}
BASELINE = "adamw"
SETTINGS = {"soap": {"max_precondition_dim": 2048}}  # the vocabulary, above it, keeps its own basis


@dataclass(frozen=True)
class Cost:
    """A rule's cost. seconds: the median step, and of it DeepSpeed's `step`: the median, and the mean, in
    which renewals count. flops: matrix products of an ordinary update; paper: what is said of them, where it
    is. model_flops: of the model in a step."""

    rule: str
    step_s: float
    update_s: float
    mean_update_s: float
    flops: int
    paper: int | None
    model_flops: int


class Timed:
    """The engine with one rule, whose updates are timed and counted."""

    def __init__(self, shape: Shape, rule: Rule, world: World) -> None:
        self.model = build(shape)
        config = RunConfig(
            sequence_length=shape.sequence_length,
            global_batch=shape.batch,
            horizon=Horizon(steps=1),
            engine=EngineConfig(zero_stage=ZERO_STAGE, precision=PRECISIONS[OURS]),
        )
        groups = parameter_groups(self.model, rule)
        self.engine = Engine(config, self.model, Causal(), rule, groups, world)
        self.steps: list[float] = []
        self.updates: list[float] = []
        inner = self.engine.engine
        self._inner, inner.step = inner.step, self._update

    def _update(self) -> None:
        start = time.perf_counter()
        self._inner()
        self.updates.append(time.perf_counter() - start)

    def train_step(self, step: int, batches: list[Batch]) -> None:
        """A step that is timed."""
        start = time.perf_counter()
        self.engine.train_step(step, batches)
        self.steps.append(time.perf_counter() - start)

    def counted(self, step: int, batches: list[Batch]) -> int:
        """FLOP of the update of a step, which is not timed, for counting takes time itself."""
        inner, counter = self.engine.engine, FlopCounterMode(display=False)

        def update() -> None:
            with counter:
                self._inner()

        inner.step = update
        self.engine.train_step(step, batches)
        inner.step = self._update
        return counter.get_total_flops()


def costs(
    shape: Shape,
    rules: dict[str, Rule],
    steps: int,
    world: World,
    prepared: Path,
    advance: Callable[[], object] = lambda: None,
) -> list[Cost]:
    """Of every rule, over `steps` steps; before them a first, in which all of them allocate and some
    decompose, and one whose FLOP are counted."""
    loops = {name: Timed(shape, rule, world) for name, rule in rules.items()}
    model_flops = count(build(shape), shape.sequence_length).training_flops_per_token * shape.tokens
    loader = make_loader(shape, prepared)
    flops = {}
    try:
        for step in range(2):
            batches = loader.step(step)
            flops = {name: loop.counted(step, batches) for name, loop in loops.items()}
        for step in range(2, steps + 2):
            batches = loader.step(step)
            for loop in loops.values():
                loop.train_step(step, batches)
                advance()
    finally:
        loader.close()
    return [
        Cost(
            name,
            median(loop.steps),
            median(loop.updates),
            mean(loop.updates),
            flops[name],
            papers(rules[name], loop.model),
            model_flops,
        )
        for name, loop in loops.items()
    ]


def papers(rule: Rule, model: nn.Module) -> int | None:
    """FLOP of an ordinary update by the rule's paper; None where there is nothing to compare."""
    total = 0
    for name, parameter in model.named_parameters():
        if not rule.takes_whole(role(model, name, parameter)) or parameter.ndim != 2:
            continue
        small, large = sorted(parameter.shape)
        if isinstance(rule, Muon):
            total += rule.iterations * 2 * (2 * large * small**2 + small**3)
        elif isinstance(rule, SOAP):
            sides = [side for side in parameter.shape if side <= rule.max_precondition_dim]
            total += 8 * sum(side * parameter.numel() for side in sides)
    return total or None


def rules_of(names: Sequence[str]) -> dict[str, Rule]:
    """By name, as conf/optim has them. Raises ValueError where there is none."""
    known = sorted(path.stem for path in (CONF / "optim").glob("*.yaml"))
    found = {}
    for name in names or known:
        if name not in known:
            raise ValueError(f"--rules: there is no {name}; choose from {', '.join(known)}")
        node = OmegaConf.merge(OmegaConf.load(CONF / "optim" / f"{name}.yaml"), SETTINGS.get(name, {}))
        found[name] = instantiate(node, "optim")
    return found


def table(found: Sequence[Cost], shape: Shape) -> Table:
    """A row for each rule."""
    title = f"{shape.name}: {shape.layers} layers x {shape.width}, {shape.tokens:,} tokens a step"
    shown = Table(title=title, title_justify="left", box=SIMPLE)
    shown.add_column("rule", no_wrap=True)
    base = next((cost.update_s for cost in found if cost.rule == BASELINE), None)
    heads = ("ms/step", "update", "(mean)", "share", f"x {BASELINE}", "products", "paper")
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    for cost in found:
        shown.add_row(
            cost.rule,
            f"{cost.step_s * 1e3:,.0f}",
            f"{cost.update_s * 1e3:,.1f}",
            f"{cost.mean_update_s * 1e3:,.1f}",
            f"{cost.update_s / cost.step_s:.1%}",
            f"{cost.update_s / base:.1f}" if base else "",
            f"{cost.flops / cost.model_flops:.2%}",
            f"{cost.paper / cost.model_flops:.2%}" if cost.paper else "",
        )
    return shown


def main() -> None:
    parser = ArgumentParser(
        prog="python -m launch.bench_optimizers",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rules", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", choices=SHAPES, default=SMALL.name)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise ValueError(f"--steps: {arguments.steps} is not positive; give a larger number")
    shape, rules = SHAPES[arguments.shape], rules_of(arguments.rules)
    prepared = prepare_library(shape.vocabulary_size)
    world = start_world()
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("steps of all rules in turn", total=arguments.steps * len(rules))
            found = costs(shape, rules, arguments.steps, world, prepared, lambda: progress.advance(task))
    finally:
        stop_world()
    console = Console(highlight=False)
    console.print(table(found, shape))
    console.print("update in ms; products, and what the paper says of them, as shares of the model's FLOP")
    console.print(f"on {device_name()}")
    if arguments.json:
        write(arguments.json, json.dumps([asdict(cost) for cost in found], indent=1) + "\n")


if __name__ == "__main__":
    main_guard(main)
