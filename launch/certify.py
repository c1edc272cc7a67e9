"""Certify every optimizer: under each way to shard, it does what it does on one process.

    python -m launch.certify [--rules adamw muon ...] [--json FILE]

Each rule of conf/optim trains a small GPT in fp32 for STEPS steps, once in a plain loop around its library's
optimizers, and once in the engine under ZeRO 0 to 3, with 1 and 4 micro-batches, with clipping on and off, on
1 and 2 ranks. A pair is certified where no parameter ends further from the plain loop's than a tolerance, in
shares of the way that the plain loop moved it, and where every parameter was stepped once a step, by the rule
that it belongs to. The tolerance is TOLERANCE, or MARGIN times what the plain loop makes of gradients that
differ by NOISE of themselves, and never above LARGEST: some rules make much of rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from data.cli import instantiate, one_line_errors
from model.gpt import GPT
from train.config import EngineConfig, Horizon, RunConfig
from train.engine import Engine, World, start_world, stop_world
from train.objective.causal import Causal
from train.optim.base import Rule
from train.optim.groups import parameter_groups
from train.ranks import start

CONF = Path(__file__).resolve().parent.parent / "conf" / "optim"
VOCABULARY, LENGTH, BATCH, WIDTH = 61, 16, 8, 32
RATES = (0.5, 1.0, 1.0, 0.75, 0.25)  # of the peak, step by step
STEPS = len(RATES)
CLIPPING = 0.1  # below the first gradients' norm
STAGES, ACCUMULATIONS, CLIPPINGS, RANKS = (0, 1, 2, 3), (1, 4), (0.0, CLIPPING), (1, 2)
TOLERANCE, NOISE, MARGIN, LARGEST = 1e-4, 1e-6, 10, 0.05
# SOAP and Shampoo normalize directions in which the gradient has nothing but rounding, which a matrix with
# more rows than columns always has: what comes out is another each time. These settings leave those out,
# renew what is otherwise renewed every 10 steps, and decay as much as shows beside rounding.
SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"weight_decay": 2.0},
    "soap": {"max_precondition_dim": WIDTH, "eps": 1e-4, "precondition_frequency": 2, "weight_decay": 2.0},
    "shampoo": {"matrix_eps": 1e-6, "precondition_frequency": 2},
}


@dataclass(frozen=True)
class Result:
    """A rule in one setting. error: the greatest of any parameter, relative to its way. worst: its name.
    rounding: the error of the plain loop with gradients that differ by NOISE.
    whole, elementwise: parameters that were stepped whole and in shares, once each step. missed: those that
    were stepped more or less often, or by the other rule."""

    rule: str
    zero_stage: int
    accumulation: int
    clipping: bool
    ranks: int
    rounding: float
    error: float
    worst: str
    whole: int
    elementwise: int
    missed: list[str]

    @property
    def certified(self) -> bool:
        return self.error <= self.tolerance and not self.missed

    @property
    def tolerance(self) -> float:
        return min(LARGEST, max(TOLERANCE, MARGIN * self.rounding))


def rules() -> list[str]:
    """The names of all rules."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def rule_of(name: str) -> Rule:
    """The rule of that name with its settings. Raises ValueError where there is none."""
    path = CONF / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"--rules: there is no {name}; choose from {', '.join(rules())}")
    return instantiate(OmegaConf.merge(OmegaConf.load(path), SETTINGS.get(name, {})), "optim")


def certificate(names: Sequence[str], world: World) -> list[Result]:
    """The results of some rules on this many ranks, all of which call it; the same on each."""
    found = []
    for name, clipping in product(names, CLIPPINGS):
        rule = rule_of(name)
        begin, end = plain(rule, clipping)
        rounding, _ = furthest(plain(rule, clipping, NOISE)[1], end, begin)
        for stage, accumulation in product(STAGES, ACCUMULATIONS):
            weights, *touched = engine(rule, stage, accumulation, clipping, world)
            error, worst = world.broadcast(furthest(weights, end, begin) if world.rank == 0 else None)
            whole, shares, missed = counted(rule, touched, world)
            setting = (name, stage, accumulation, clipping > 0, world.size)
            found.append(Result(*setting, rounding, error, worst, whole, shares, missed))
    return found


def furthest(
    found: dict[str, Tensor], expected: dict[str, Tensor], begin: dict[str, Tensor]
) -> tuple[float, str]:
    """The parameter that is furthest from what was expected, relative to its way from the beginning (L2)."""
    norm = torch.linalg.vector_norm
    errors = {
        name: (norm(found[name] - weight) / norm(weight - begin[name])).item()
        for name, weight in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def gpt() -> GPT:
    """Without biases: a key's has no gradient but noise, which some rules take for a direction."""
    torch.manual_seed(0)
    return GPT(
        vocabulary_size=VOCABULARY,
        sequence_length=LENGTH,
        layers=2,
        width=WIDTH,
        heads=2,
        bias=False,
        tied=False,
        position="rotary",
    )


def batch_of(step: int) -> dict[str, Tensor]:
    """A global batch; its sequences differ in how many tokens carry loss."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = (tokens * 3 + 1) % VOCABULARY
    for row in range(BATCH):
        labels[row, LENGTH - row :] = -100
    return {"tokens": tokens, "labels": labels}


def plain(rule: Rule, clipping: float, noise: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before and after STEPS steps of the library's optimizers on whole parameters.

    noise: standard deviation of a factor of each element of the gradients, around 1.
    """
    model, objective = gpt(), Causal()
    generator = torch.Generator().manual_seed(0)
    begin = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = rule.optimizers(parameter_groups(model, rule))
    every = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in every]
    for step, rate in enumerate(RATES):
        loss_sum, count, _ = objective(model, batch_of(step))
        (loss_sum / count).backward()
        for parameter in model.parameters() if noise else ():
            assert parameter.grad is not None
            parameter.grad *= 1 + noise * torch.randn(parameter.shape, generator=generator)
        if clipping:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clipping)
            assert norm > clipping or step
        for group, peak in zip(every, peaks, strict=True):
            group["lr"] = peak * rate
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if rule.averages:
        for optimizer in optimizers:
            optimizer.eval()  # type: ignore[attr-defined]
    return begin, {name: weight.detach().clone() for name, weight in model.named_parameters()}


def engine(
    rule: Rule, stage: int, accumulation: int, clipping: float, world: World
) -> tuple[dict[str, Tensor], Counter[str], Counter[str]]:
    """On rank 0 the weights after the same steps in the engine; how often each parameter was stepped here,
    whole and in shares."""
    micro = BATCH // (world.size * accumulation)
    config = RunConfig(
        sequence_length=LENGTH,
        global_batch=BATCH,
        micro_batch=micro,
        horizon=Horizon(steps=STEPS),
        engine=EngineConfig(threads=1, zero_stage=stage, precision="fp32", gradient_clipping=clipping),
    )
    model = gpt()
    made = Engine(config, model, Causal(), rule, parameter_groups(model, rule), world)
    whole, shares = made.count_steps()
    for step, rate in enumerate(RATES):
        made.set_learning_rate(rate)
        batch = batch_of(step)
        mine = [
            {key: tensor[first : first + micro] for key, tensor in batch.items()}
            for first in range(world.rank * micro, BATCH, world.size * micro)
        ]
        made.train_step(step, mine)
    return made.snapshot(aside=True)[1] or {}, whole, shares


def counted(rule: Rule, touched: Sequence[Counter[str]], world: World) -> tuple[int, int, list[str]]:
    """How many parameters were stepped whole, how many in shares, and which not as the rule has it."""
    model = gpt()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    asked = {
        names[id(parameter)]: bool(group.get("whole"))
        for group in parameter_groups(model, rule)
        for parameter in group["params"]
    }
    ranks = world.gather(tuple(touched))
    whole = sum((counts for counts, _ in ranks), Counter[str]())
    shares = [counts for _, counts in ranks]
    missed = [
        name
        for name, is_whole in asked.items()
        if whole[name] != (STEPS if is_whole else 0)
        or any(counts[name] != (0 if is_whole else STEPS) for counts in shares)
    ]
    return len(whole), len(set().union(*shares)), missed


def table(found: Sequence[Result]) -> str:
    """Markdown: a row for each rule, with the greatest error over its settings by ZeRO stage."""
    lines = [
        f"| rule | whole | in shares | rounding | {' | '.join(f'ZeRO-{stage}' for stage in STAGES)} |",
        f"| --- | ---: | ---: | ---: |{' ---: |' * len(STAGES)}",
    ]
    for name in dict.fromkeys(result.rule for result in found):
        mine = [result for result in found if result.rule == name]
        cells = []
        for stage in STAGES:
            here = [result for result in mine if result.zero_stage == stage]
            failed = "" if all(result.certified for result in here) else " FAILED"
            cells.append(f"{max(result.error for result in here):.0e}{failed}")
        rounding = max(result.rounding for result in mine)
        counts = f"{mine[0].whole} | {mine[0].elementwise} | {rounding:.0e}"
        lines.append(f"| {name} | {counts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(names: Sequence[str]) -> list[Result]:
    """The results of some rules on 1 and on 2 ranks, each number in processes of its own."""
    found: list[Result] = []
    with TemporaryDirectory() as folder:
        for ranks in RANKS:
            path = Path(folder, f"{ranks}.json")
            command = [sys.executable, "-m", "launch.certify", "--rank-results", str(path), "--rules", *names]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            if code := start(command, ranks, environment, (), grace=10.0):
                raise SystemExit(code)
            found += [Result(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return found


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.certify")
    parser.add_argument(
        "--rules", nargs="+", default=rules(), help="names of files in conf/optim; all by default"
    )
    parser.add_argument("--json", type=Path, help="where all results go")
    parser.add_argument("--rank-results", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_results:  # one of the ranks
        world = start_world()
        mine = [asdict(result) for result in certificate(arguments.rules, world)]
        if world.rank == 0:
            arguments.rank_results.write_text(json.dumps(mine), encoding="utf-8")
        stop_world()
        return
    for name in arguments.rules:
        rule_of(name)
    found = run(arguments.rules)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n")
    print(table(found))
    failed = [result for result in found if not result.certified]
    for result in failed:
        print(f"not certified: {result}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
