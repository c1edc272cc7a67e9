"""The gradient noise scale: its estimate where the answer is known, and runs that do not notice it."""

from __future__ import annotations

import importlib
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors.torch import load_file
from torch import nn

from tests.distributed import run_ranks
from tests.tiny import begun, config
from tests.train.test_engine import LENGTH, VOCABULARY, make_batches, make_config
from tests.train.test_run import SMALL, fp16_here, train_all
from train.checkpoint import WEIGHTS, path_of, remove_after
from train.config import EngineConfig, Horizon, RunConfig, check_world
from train.engine import Step
from train.noise import DECAY, Averages, Estimate, estimate
from train.records import read_metrics
from train.rundir import RunDir

WIDTH, SEQUENCES, LABELS = 12, 8, 4  # of the quadratic: parameters, sequences a step, most labels of one
MEAN = torch.linspace(-0.6, 0.6, WIDTH)
DEVIATION = torch.linspace(0.5, 1.5, WIDTH)
MEASURES = 300

ADAMW = ("train.optim.adamw", "AdamW")
STEPS = {  # precision, ZeRO stage, micro batch, dropout, offload to the host, optimizer
    **{f"zero{stage}-bf16": ("bf16", stage, None, 0.0, False, ADAMW) for stage in range(4)},
    **{f"zero{stage}-accumulated": ("fp32", stage, 2, 0.0, False, ADAMW) for stage in range(4)},
    **{f"zero{stage}-fp16": ("fp16", stage, None, 0.0, False, ADAMW) for stage in range(4)},
    "dropout": ("bf16", 2, 2, 0.2, False, ADAMW),
    "offload": ("bf16", 2, 2, 0.0, True, ADAMW),
    "whole": ("bf16", 1, 2, 0.0, False, ("train.optim.muon", "Muon")),
    "averaged": ("bf16", 3, 2, 0.0, False, ("train.optim.schedule_free", "ScheduleFree")),
}
RUNS = {
    "zero0": ["engine=zero0", *SMALL],
    "masked": ["experiment=bert-tiny", "engine=zero3", "micro_batch=1", *SMALL],
}


def test_two_norms_give_back_what_they_were_made_of() -> None:
    squared, trace = 0.25, 36.0
    norms = {size: squared + trace / size for size in (4, 32)}
    found = estimate(norms[4], 4, norms[32], 32)
    assert found.gradient_sq == pytest.approx(squared)
    assert found.trace == pytest.approx(trace)


def test_the_estimate_has_no_bias() -> None:
    """Gradients with known mean and covariance; the small batch is part of the big one."""
    generator = np.random.default_rng(0)
    mean, deviation = MEAN.numpy(), DEVIATION.numpy()
    found = []
    for _ in range(4000):
        gradients = mean + deviation * generator.standard_normal((16, WIDTH))
        norms = [float(np.square(gradients[:size].mean(0)).sum()) for size in (2, 16)]
        found.append(estimate(norms[0], 2, norms[1], 16))
    assert_estimates(found, float((mean**2).sum()), float((deviation**2).sum()))


def assert_estimates(found: list[Estimate], squared: float, trace: float) -> None:
    """Their means are the known values, within 4 standard errors."""
    for values, known in (
        (np.array([one.gradient_sq for one in found]), squared),
        (np.array([one.trace for one in found]), trace),
    ):
        error = values.std(ddof=1) / len(values) ** 0.5
        assert error < 0.1 * known
        assert abs(values.mean() - known) < 4 * error


def test_averages_are_divided_and_not_ratios_averaged() -> None:
    one, other = Estimate(gradient_sq=1.0, trace=10.0), Estimate(gradient_sq=3.0, trace=90.0)
    assert Averages().after(one).scale == pytest.approx(10)  # not drawn to the zeros that it began with
    expected = (10 * DECAY + 90) / (1 * DECAY + 3)
    assert Averages().after(one).after(other).scale == pytest.approx(expected)
    assert Averages().scale is None
    assert Averages().after(Estimate(gradient_sq=-1.0, trace=10.0)).scale is None


class Quadratic(nn.Module):
    """Half the squared distance of its weights from each point, with their difference as gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, points_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return (0.5 * (self.weight - points_BTD)[labels_BT >= 0] ** 2).sum()


def batch_of(step: int) -> dict[str, torch.Tensor]:
    """A global batch; its sequences differ in how many labels they hold."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(SEQUENCES, LABELS, WIDTH, generator=generator)
    held = torch.arange(LABELS) <= torch.arange(SEQUENCES)[:, None] * 3 % LABELS
    return {"points": MEAN + DEVIATION * noise, "labels": torch.where(held, 0, -100)}


def part_norms(cases: list[RunConfig]) -> list[list[tuple[float, int, float, int]]]:
    """One rank: by case and step the norm and the labels of a part, and those of all."""
    from train.engine import Engine, start_world
    from train.objective.base import Objective
    from train.optim.adamw import AdamW

    class Distance(Objective):
        def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return model(batch["points"], batch["labels"])

    world, found = start_world(), []
    for case in cases:
        model, rule = Quadratic(), AdamW(learning_rate=0.1)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        engine = Engine(case, model, Distance(), rule, groups, world)
        engine.set_learning_rate(0.0)
        micro = case.micro_batch or SEQUENCES // world.size
        measured = []
        for step in range(MEASURES if case is cases[0] else 3):
            rows = {key: t.unflatten(0, (-1, world.size, micro)) for key, t in batch_of(step).items()}
            batches = [{key: t[i, world.rank] for key, t in rows.items()} for i in range(len(rows["labels"]))]
            part = engine.part_of_step(step, batches)
            whole = engine.train_step(step, batches)
            assert part.skipped and not whole.skipped
            measured.append((part.gradient_norm, part.count, whole.gradient_norm, whole.count))
        found.append(measured)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_measures_a_quadratic(ranks: int) -> None:
    """The part is one micro batch of each rank, or of half of the ranks: always the first sequences."""
    parts = [(2, 2 * ranks), (None, SEQUENCES // ranks)][:ranks]  # micro batch, sequences
    cases = [
        RunConfig(
            global_batch=SEQUENCES,
            micro_batch=micro,
            horizon=Horizon(steps=1),
            engine=EngineConfig(zero_stage=stage, precision="fp32", threads=1),
        )
        for micro, _ in parts
        for stage in range(4)
    ]
    results = run_ranks(part_norms, ranks, cases)
    assert all(result == results[0] for result in results)
    for index, measured in enumerate(results[0]):
        sequences = parts[index // 4][1]
        for step, (small, small_labels, big, big_labels) in enumerate(measured):
            batch = batch_of(step)
            held = [batch["points"][:size][batch["labels"][:size] >= 0] for size in (sequences, SEQUENCES)]
            assert [small_labels, big_labels] == [len(points) for points in held]
            assert [small, big] == pytest.approx([float(points.mean(0).norm()) for points in held], rel=1e-5)
    found = [estimate(small**2, few, big**2, many) for small, few, big, many in results[0][0]]
    assert_estimates(found, float((MEAN**2).sum()), float((DEVIATION**2).sum()))


def contents(node: Any, place: str = "") -> dict[str, Any]:
    """All that a checkpoint's state holds, by its place in it."""
    if torch.is_tensor(node):
        return {place: (node.dtype, node.tolist())}
    if isinstance(node, DynamicLossScaler):
        return contents(vars(node), place)
    if isinstance(node, dict | list | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for key, value in items for k, v in contents(value, f"{place}/{key}").items()}
    return {place: node} if isinstance(node, int | float) else {}


def states() -> dict[str, list[tuple[dict[str, Any], list[Step]]]]:
    """One rank: by case what 4 steps lead to and what they tell, without measurements and with them."""
    return {name: [four_steps(*case, measured) for measured in (False, True)] for name, case in STEPS.items()}


def four_steps(
    precision: str,
    stage: int,
    micro: int | None,
    dropout: float,
    offload: bool,
    optimizer: tuple[str, str],
    measured: bool,
) -> tuple[dict[str, Any], list[Step]]:
    from model.gpt import GPT
    from train.engine import Engine, start_world
    from train.objective.causal import Causal
    from train.optim.groups import parameter_groups

    case = make_config(micro_batch=micro, zero_stage=stage, precision=precision, offload_optimizer=offload)
    world = start_world()
    torch.manual_seed(0)
    model = GPT(
        vocabulary_size=VOCABULARY, sequence_length=LENGTH, layers=1, width=16, heads=2, dropout=dropout
    )
    module, name = optimizer
    rule = getattr(importlib.import_module(module), name)(learning_rate=3e-3)
    with fp16_here(17, 1) if precision == "fp16" else nullcontext():
        engine = Engine(case, model, Causal(), rule, parameter_groups(model, rule), world)
        told = []
        for step in range(4):
            batches = make_batches(case, step, world.rank, world.size)
            if measured:
                engine.part_of_step(step, batches)
            told.append(engine.train_step(step, batches))
        files, weights = engine.snapshot(aside=True)
    return contents([files, weights or {}]), told


@pytest.fixture(scope="module")
def stepped() -> list[Any]:
    """What `states` found on two ranks."""
    return run_ranks(states, 2)


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_are_measured_are_bit_for_bit_those_that_are_not(stepped: Any, name: str) -> None:
    for rank in stepped:
        (plain, told), (measured, told_beside) = rank[name]
        assert plain == measured
        assert told == told_beside
        assert any(step.skipped for step in told) == name.endswith("fp16")
        assert not all(step.skipped for step in told)
    assert any("exp_avg" in place or "momentum" in place for place in stepped[0][name][0][0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """By case: a run without measurements, one that measures at every step, and the latter broken off after
    its step 3 and gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    found = {
        name: [begun(folder, name, 2, *more), begun(folder, f"{name}-measured", 2, *more, "noise.every=1")]
        for name, more in RUNS.items()
    }
    run_ranks(train_all, 2, [directory for pair in found.values() for directory in pair])
    for _, measured in found.values():
        copy = measured.with_name(measured.name + "-broken")
        shutil.copytree(measured, copy)
        remove_after(copy / "checkpoints", 3)
        found[measured.name.removesuffix("-measured")].append(copy)
    run_ranks(train_all, 2, [broken for _, _, broken in found.values()])
    return found


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Those of one kind, without what a clock says."""
    timed = ("elapsed_s", "tokens_per_s", "flops_per_s", "data_wait_share", "memory_bytes", "peak_share")
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in read_metrics(directory / "metrics.jsonl")
        if record["kind"] == kind
    ]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_not_notice(runs: Any, name: str) -> None:
    plain, measured, _ = runs[name]
    first, second = (load_file(path_of(one / "checkpoints", 6) / WEIGHTS) for one in (plain, measured))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for kind in ("train", "eval"):
        assert records(plain, kind) == records(measured, kind)
    assert records(plain, "noise") == []


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_tells(runs: Any, name: str) -> None:
    _, measured, broken = runs[name]
    found, made = records(measured, "noise"), records(measured, "train")
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    assert [r["tokens"] for r in found] == [256 * r["step"] for r in found]
    averages = Averages()
    for record, step in zip(found, made, strict=True):
        squared = record["gradient_sq"] + record["trace"] / 256  # that of a batch of 256 tokens
        assert squared == pytest.approx(step["gradient_norm"] ** 2)
        averages = averages.after(Estimate(record["gradient_sq"], record["trace"]))
        assert record["scale"] == averages.scale
        assert record["scale_sequences"] == (averages.scale and averages.scale / 32)
    assert found[-1]["scale"] is not None
    assert records(broken, "noise") == found


def test_a_part_needs_a_second_micro_batch(tmp_path: Path) -> None:
    wanted = config(tmp_path, "noise.every=2")
    with pytest.raises(ValueError, match="^noise.every: compares .* one, of 8 sequences; set a smaller"):
        check_world(wanted, 1)
    check_world(wanted, 2)
    check_world(config(tmp_path, "noise.every=2", "micro_batch=4", "engine=zero1"), 1)
    with pytest.raises(ValueError, match="^noise.every: 0 is not a positive number"):
        config(tmp_path, "noise.every=0")


def test_it_may_be_turned_on_in_a_run_that_has_begun(tmp_path: Path) -> None:
    directory = begun(tmp_path, "run", 2)
    RunDir(directory).check_resume(config(tmp_path, f"directory={directory}", "name=run", "noise.every=2"))
