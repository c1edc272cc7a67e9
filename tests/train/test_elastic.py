"""Runs that go on with another number of ranks, ZeRO stage or micro batch, on real ranks."""

from __future__ import annotations

import importlib
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import begun
from tests.train.test_engine import VOCABULARY, make_batches, make_config
from tests.train.test_run import StopAfterAStep, fp16_here, hurry, train_all
from train.checkpoint import path_of, read_state, remove_after
from train.records import read_metrics

STAGES = range(4)
BATCH = 12  # which 1, 2 and 3 ranks can share
BEFORE, AFTER = 3, 6  # steps until a checkpoint, and beyond it

# Engines of every stage, on sizes that no number of ranks divides.


@dataclass(frozen=True)
class Source:
    """Engines of `ranks` ranks and ZeRO `stage`, whose checkpoint of step BEFORE others go on from."""

    ranks: int
    stage: int
    precision: str

    def __str__(self) -> str:
        return f"{self.precision}-{self.ranks}xZeRO{self.stage}"

    @property
    def micro_batch(self) -> int | None:
        """Without ZeRO, only fp32 is accumulated."""
        return 2 if self.precision == "fp32" else None


@dataclass(frozen=True)
class Target:
    """Engines that go on from the checkpoint of others."""

    source: Source
    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.source}-to-{self.ranks}xZeRO{self.stage}"


@dataclass(frozen=True)
class Found:
    """What an engine did from its checkpoint on, and what it then held.

    losses: global means. state: by parameter, the fp32 weights and the optimizer's states, whole and flat.
    """

    losses: list[float]
    state: dict[str, dict[str, torch.Tensor]]
    scalars: dict[str, float]
    loss_scale: float
    weights: dict[str, torch.Tensor] | None = field(repr=False)
    decay: list[float]


CHANGES = ((2, 1), (1, 2), (2, 3))


def targets() -> list[Target]:
    """In fp32, every pair of stages from 2 ranks to 1, and in the other changes every stage from two and to
    two; in bf16, every pair with one of the changes; some in fp16; some with as many ranks as before."""
    pairs = [(before, after) for before in STAGES for after in STAGES]
    fp32 = [Target(Source(2, a, "fp32"), 1, b) for a, b in pairs]
    fp32 += [Target(Source(1, a, "fp32"), 2, b) for a, b in pairs if (b - a) % 4 in (0, 1)]
    fp32 += [Target(Source(2, a, "fp32"), 3, b) for a, b in pairs if (b - a) % 4 in (0, 2)]
    bf16 = [Target(Source(n, a, "bf16"), m, b) for a, b in pairs for n, m in [CHANGES[(a + 2 * b) % 4 % 3]]]
    fp16 = [Target(Source(2, a, "fp16"), 1, b) for a, b in ((0, 3), (1, 0), (3, 1))]
    alone = [Target(Source(2, a, p), 2, b) for a, b, p in ((2, 3, "bf16"), (1, 2, "bf16"), (3, 0, "fp32"))]
    return [*fp32, *bf16, *fp16, *alone]


def sources() -> list[Source]:
    return list(dict.fromkeys(target.source for target in targets()))


def make_engine(precision: str, stage: int, micro_batch: int | None) -> tuple[Any, Any]:
    from model.gpt import GPT
    from train.engine import Engine, start_world
    from train.objective.causal import Causal
    from train.optim.adamw import AdamW
    from train.optim.groups import parameter_groups

    config = make_config(BATCH, micro_batch, precision=precision, zero_stage=stage)
    torch.manual_seed(0)
    model = GPT(vocabulary_size=VOCABULARY + 1, sequence_length=16, layers=1, width=33, heads=3)
    rule = AdamW(learning_rate=3e-3)
    return Engine(config, model, Causal(), rule, parameter_groups(model, rule), start_world()), config


def train(engine: Any, config: Any, steps: range) -> list[float]:
    """The mean loss of each step."""
    world, losses = engine.world, []
    for step in steps:
        engine.set_learning_rate(1.0)
        result = engine.train_step(step, make_batches(config, step, world.rank, world.size))
        losses.append(world.sum(result.loss_sum)[0] / result.count)
    return losses


def write(engine: Any, folder: Path) -> dict[str, torch.Tensor] | None:
    """A checkpoint's files, by all ranks; returns the weights on rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    contents, weights = engine.snapshot(aside=True)
    for name, content in contents.items():
        torch.save(content, folder / name)
    engine.world.barrier()
    return weights


def examine(engine: Any, config: Any, folder: Path) -> Found:
    """Train on from a checkpoint that was just loaded or is to be saved; what is in it is what it held."""
    from train import elastic

    weights = write(engine, folder)
    with torch.serialization.safe_globals(elastic.TRUSTED):
        if engine.zero_stage == 0:
            shards = elastic._unsharded(folder, engine.group_names)
        else:
            shards = (elastic._stage_3 if engine.zero_stage == 3 else elastic._stages_1_and_2)(folder)
    state = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in shards.parameters}
    scalars = {key: float(value) for key, value in shards.scalars.items()}
    decay = [group["weight_decay"] for group in engine.engine.basic_optimizer.param_groups]
    losses = train(engine, config, range(BEFORE, BEFORE + AFTER))
    return Found(losses, state, scalars, shards.loss_scale, weights, decay)


def place(folder: Path, source: Source) -> Path:
    return folder / f"{source.precision}-{source.ranks}-{source.stage}"


def go_on(target: Target, folder: Path) -> Found:
    from train.elastic import redistribute

    source = target.source
    with fp16_here(10, 1000) if source.precision == "fp16" else nullcontext():
        engine, config = make_engine(source.precision, target.stage, None)
        redistribute(engine, place(folder, source), source.stage)
        return examine(engine, config, place(folder, source) / f"{target.ranks}-{target.stage}")


def go_from(source: Source, folder: Path) -> Found:
    with fp16_here(15, 1000) if source.precision == "fp16" else nullcontext():
        engine, config = make_engine(source.precision, source.stage, source.micro_batch)
        train(engine, config, range(BEFORE))
        return examine(engine, config, place(folder, source))


# Whole runs, each in four parts.

SHORT = ["global_batch=12", "evaluation.every=null", "checkpoint.every=null", "engine.threads=1"]
SMALL = [*SHORT, "model.layers=1", "model.width=32", "model.heads=2"]
WORLDS = (2, 1, 2, 3)
CHAINS: dict[str, tuple[list[str], list[list[str]], list[int]]] = {
    # what all parts share; what each has of its own; the step at which each ends
    "ranks": (SMALL, [[]] * 4, [14, 27, 40, 52]),
    "stages": (
        [*SMALL, "engine.precision=fp32", "model.width=33", "model.heads=3"],
        [["engine=zero1", "micro_batch=2"], ["engine=zero2"], ["engine=zero3"], ["engine=zero0"]],
        [3, 6, 9, 12],
    ),
    **{
        family: (
            [f"experiment={family}", *SMALL, "model.dropout=0", "engine.precision=fp32"],
            [[], ["engine=zero3"]],
            [3, 6],
        )
        for family in ("bert-tiny", "t5-tiny")
    },
}


class StopAt(StopAfterAStep):
    """Has a run end at a step."""

    def __init__(self, run: Any, step: int) -> None:
        super().__init__(run)
        self.step = step

    @property
    def requested(self) -> str | None:
        return "a test" if self.run.done == self.step < self.run.total_steps else None


def run_until(directory: Path, step: int) -> None:
    """One rank of a run's next part."""
    from train.config import load
    from train.engine import start_world
    from train.run import Run
    from train.rundir import RunDir

    rundir = RunDir(directory)
    run = Run(rundir, load(rundir.config), start_world())
    run.train(StopAt(run, step))  # type: ignore[arg-type]
    run.close(failed=False)


@dataclass(frozen=True)
class Work:
    """What one world is to do. runs: directories, and the steps at which they are to stop."""

    folder: Path
    runs: list[tuple[Path, int]]
    sources: list[Source]
    targets: list[Target]


def work(given: Work) -> dict[Any, Found]:
    """One rank; only the first returns what it found."""
    from train import deepspeed_config
    from train.engine import start_world

    hurry()
    for directory, step in given.runs:
        run_until(directory, step)
    found: dict[Any, Found] = {source: go_from(source, given.folder) for source in given.sources}
    found |= {target: go_on(target, given.folder) for target in given.targets}
    importlib.reload(deepspeed_config)  # where the ranks of tests have it share out small parameters too
    for target in given.targets:
        if target == KEPT_WHOLE:
            found["kept whole"] = go_on(target, given.folder)
    return found if start_world().rank == 0 else {}


KEPT_WHOLE = Target(Source(2, 3, "fp32"), 3, 3)  # is done again where ZeRO-3 keeps small parameters whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[Any, Found]:
    """By source or target, what its engine did; then the runs lie in the folder."""
    results: dict[Any, Found] = {}
    unbroken = [
        (begun(folder, f"{name}-unbroken", 2, *shared, *parts[0], f"horizon.steps={ends[-1]}"), ends[-1])
        for name, (shared, parts, ends) in CHAINS.items()
    ]
    for number, ranks in enumerate(WORLDS):
        runs = [
            (begun(folder, name, ranks, *shared, *parts[number], f"horizon.steps={ends[-1]}"), ends[number])
            for name, (shared, parts, ends) in CHAINS.items()
            if number < len(parts)
        ]
        new = [source for source in sources() if source.ranks == ranks] if number < 2 else []
        mine = [
            target
            for target in targets()
            if target.ranks == ranks and (target.source.ranks == 2) == (number != 2)
        ]
        given = Work(folder, [*(unbroken if number == 0 else []), *runs], new, mine)
        results |= run_ranks(work, ranks, given)[0]
    return results


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("target", [*targets(), "kept whole"], ids=str)
def test_what_is_dealt_out_is_what_was_there(found: dict[Any, Found], target: Target) -> None:
    now, before = found[target], found[KEPT_WHOLE.source if target == "kept whole" else target.source]
    assert now.state.keys() == before.state.keys()
    for name, tensors in before.state.items():
        assert {"fp32", "exp_avg", "exp_avg_sq"} == tensors.keys()
        assert equal(now.state[name], tensors), name
    assert now.scalars == before.scalars and now.scalars["step"] > 0
    assert now.loss_scale == before.loss_scale
    assert now.weights and before.weights and equal(now.weights, before.weights)
    assert now.decay == before.decay == [0.1, 0.0]


@pytest.mark.parametrize("source", sources(), ids=str)
def test_what_is_read_of_a_checkpoint_is_what_the_engine_held(
    found: dict[Any, Found], source: Source
) -> None:
    """Its weights, as the engine itself gathers them."""
    weights = found[source].weights
    assert weights is not None
    for name, tensors in found[source].state.items():
        assert torch.equal(tensors["fp32"].to(weights[name].dtype), weights[name].flatten())
        assert tensors["exp_avg"].numel() == weights[name].numel() and tensors["exp_avg"].any()


TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


@pytest.mark.parametrize("target", [*targets(), "kept whole"], ids=str)
def test_training_goes_on_as_if_nothing_had_changed(found: dict[Any, Found], target: Target) -> None:
    source = KEPT_WHOLE.source if target == "kept whole" else target.source
    expected = found[source].losses
    assert expected[-1] < expected[0] - 0.1
    assert found[target].losses == pytest.approx(expected, abs=TOLERANCE[source.precision])


def losses(folder: Path, name: str) -> list[tuple[int, float]]:
    records = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.usefixtures("found")
def test_a_run_that_changes_its_ranks_learns_as_the_unbroken_one(folder: Path, name: str) -> None:
    expected, got = losses(folder, f"{name}-unbroken"), losses(folder, name)
    last = CHAINS[name][2][-1]
    assert [step for step, _ in got] == [step for step, _ in expected] == list(range(1, last + 1))
    assert expected[-1][1] < expected[0][1] - 0.2
    tolerance = 1e-3 if name == "ranks" else 1e-5  # of bf16, and of fp32
    assert got == [(step, pytest.approx(loss, abs=tolerance)) for step, loss in expected]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.usefixtures("found")
def test_a_run_says_what_it_was_converted_from_and_to(folder: Path, name: str) -> None:
    events = [r for r in read_metrics(folder / "runs" / name / "metrics.jsonl") if r["kind"] == "event"]
    ends = CHAINS[name][2]
    assert [(event["step"], event["event"]) for event in events] == [
        (0, "start"),
        *[(end, event) for end in ends[:-1] for event in ("interrupt", "resume", "converted")],
        (ends[-1], "finish"),
    ]
    stages = {"ranks": [2, 2, 2, 2], "stages": [1, 2, 3, 0]}.get(name, [2, 3])
    layouts = [f"{ranks} rank(s), ZeRO-{stage}" for ranks, stage in zip(WORLDS, stages, strict=False)]
    assert [event["message"] for event in events if event["event"] == "converted"] == [
        f"the checkpoint of {before} is dealt out to {after}" for before, after in pairwise(layouts)
    ]
    last = path_of(folder / "runs" / name / "checkpoints", ends[-1])
    assert read_state(last)["layout"] == {"world_size": WORLDS[len(ends) - 1], "zero_stage": stages[-1]}


# Rules that keep more than an elementwise state: the engine that they begin with on 2 ranks, the one that
# they go on with, and on how many.
MOVES = [
    ("muon", "engine=zero2", "engine=zero3", 1),
    ("adafactor", "engine=zero3", "engine=zero1", 3),
    ("schedule-free", "engine=zero1", "engine=zero3", 1),
    ("adabound", "engine=zero3", "engine=zero0", 3),
]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    """By rule, the losses of 6 steps on 2 ranks, and of some that broke off after 3 and went on elsewhere."""
    folder = tmp_path_factory.mktemp("moved")
    small = [
        "optim.learning_rate=3e-3",
        "model.layers=1",
        "model.width=33",
        "model.heads=3",
        "engine.precision=fp32",
        f"global_batch={BATCH}",
    ]
    whole = [begun(folder, rule, 2, f"optim={rule}", *small, engine) for rule, engine, _, _ in MOVES]
    run_ranks(train_all, 2, whole)
    for directory in whole:
        copy = directory.with_name(directory.name + "-moved")
        shutil.copytree(directory, copy)
        remove_after(copy / "checkpoints", 3)
    for ranks in (1, 3):
        again = [
            begun(folder, f"{rule}-moved", ranks, f"optim={rule}", *small, engine)
            for rule, _, engine, there in MOVES
            if there == ranks
        ]
        run_ranks(train_all, ranks, again)
    return {
        directory.name: (losses_of(directory), losses_of(folder / "runs" / f"{directory.name}-moved"))
        for directory in whole
    }


def losses_of(directory: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl") if row["kind"] == "train"]


@pytest.mark.parametrize(
    ("rule", "tolerance"), [("muon", 1e-3), ("adafactor", 1e-4), ("schedule-free", 1e-4), ("adabound", 1e-4)]
)
def test_what_a_rule_keeps_goes_along_to_another_world(moved: Any, rule: str, tolerance: float) -> None:
    unbroken, went_on = moved[rule]
    assert len(unbroken) == len(went_on) == 6
    assert went_on[:3] == unbroken[:3]
    assert went_on[3:] == pytest.approx(unbroken[3:], abs=tolerance)
    assert unbroken[5] < unbroken[3] - 10 * tolerance
