"""The engine on real ranks: what is computed does not depend on how it is split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from train.config import EngineConfig, Horizon, RunConfig
from train.engine import operators_folder

VOCABULARY, LENGTH, GLOBAL_BATCH = 64, 16, 8


def make_config(global_batch: int = GLOBAL_BATCH, micro_batch: int | None = None, **engine: Any) -> RunConfig:
    return RunConfig(
        sequence_length=LENGTH,
        global_batch=global_batch,
        micro_batch=micro_batch,
        horizon=Horizon(steps=1),
        engine=EngineConfig(threads=1, **engine),  # more would wait for each other in products this small
    )


def make_engine(config: RunConfig, dropout: float = 0.0) -> Any:
    from model.gpt import GPT
    from train.engine import Engine, start_world
    from train.objective.causal import Causal
    from train.optim.adamw import AdamW
    from train.optim.groups import parameter_groups

    world = start_world()
    torch.manual_seed(0)
    model = GPT(
        vocabulary_size=VOCABULARY, sequence_length=LENGTH, layers=2, width=32, heads=4, dropout=dropout
    )
    rule = AdamW(learning_rate=3e-3)
    return Engine(config, model, Causal(), rule, parameter_groups(model, rule), world)


def make_batches(config: RunConfig, step: int, rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of a global batch of the step; its sequences differ in how many tokens carry loss."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (config.global_batch, LENGTH), generator=generator)
    labels = (tokens * 3 + 1) % VOCABULARY
    for row in range(config.global_batch):
        labels[row, : row * LENGTH // config.global_batch] = -100
    micro = config.micro_batch or config.global_batch // size
    split = (-1, size, micro, LENGTH)
    return [
        {"tokens": t, "labels": y}
        for t, y in zip(tokens.reshape(split)[:, rank], labels.reshape(split)[:, rank], strict=True)
    ]


def losses_and_norms(configs: list[RunConfig], steps: int) -> list[tuple[list[float], list[float]]]:
    """Per config: the mean loss and the gradient norm of each step, over the whole global batch."""
    results = []
    for config in configs:
        engine = make_engine(config)
        world = engine.world
        losses, norms = [], []
        for step in range(steps):
            engine.set_learning_rate(1.0)
            result = engine.train_step(step, make_batches(config, step, world.rank, world.size))
            losses.append(world.sum(result.loss_sum)[0] / result.count)
            norms.append(result.gradient_norm)
        results.append((losses, norms))
    return results


def states(folder: str) -> list[dict[str, Any]]:
    """By ZeRO stage: bytes of state after one step in bf16, and the shapes of the weights that are saved."""
    from model.gpt import GPT
    from train.engine import Engine, start_world
    from train.objective.causal import Causal
    from train.optim.adamw import AdamW
    from train.optim.groups import parameter_groups

    results = []
    for stage in range(4):
        config, world = make_config(zero_stage=stage), start_world()
        model = GPT(vocabulary_size=VOCABULARY, sequence_length=LENGTH, layers=2, width=256, heads=4)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        rule = AdamW(learning_rate=3e-3)
        engine = Engine(config, model, Causal(), rule, parameter_groups(model, rule), world)
        engine.train_step(0, make_batches(config, 0, world.rank, world.size))
        _, weights = engine.snapshot(aside=True)
        saved = None if weights is None else {name: tuple(weight.shape) for name, weight in weights.items()}
        results.append({"bytes": engine.state_bytes(), "shapes": shapes, "saved": saved})
    return results


CASES = [
    *[("fp32", stage, None) for stage in range(4)],
    *[("fp32", stage, 2) for stage in (0, 2)],
    *[("bf16", stage, None) for stage in range(4)],
    *[("bf16", stage, 2) for stage in (1, 2, 3)],
]


def everything(folder: str) -> tuple[list[tuple[list[float], list[float]]], list[dict[str, Any]]]:
    """One rank of all that this module looks at: 50 steps of every case, and the states."""
    configs = [make_config(precision=p, zero_stage=stage, micro_batch=micro) for p, stage, micro in CASES]
    return losses_and_norms(configs, 50), states(folder)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """What each rank found, by the number of ranks, after a build of DeepSpeed's operators was broken off."""
    operators_folder().mkdir(parents=True, exist_ok=True)
    (operators_folder() / "lock").touch()  # for which torch would wait for ever
    return {n: run_ranks(everything, n, str(tmp_path_factory.mktemp("states"))) for n in (1, 2)}


def runs_of(worlds: dict[int, list[Any]], precision: str) -> dict[tuple[int, int, int | None], Any]:
    """Losses and norms by (ranks, ZeRO stage, micro batch)."""
    assert all(runs == ranks[0][0] for ranks in worlds.values() for runs, _ in ranks)
    return {
        (size, stage, micro): result
        for size, ranks in worlds.items()
        for (kind, stage, micro), result in zip(CASES, ranks[0][0], strict=True)
        if kind == precision
    }


def test_fp32_losses_do_not_depend_on_ranks_stage_or_micro_batch(worlds: Any) -> None:
    runs = runs_of(worlds, "fp32")
    reference, norms = runs[(1, 0, None)]
    assert reference[-1] < reference[0] - 1  # it learns, so agreement is not that of a standstill
    assert all(norm > 0 for norm in norms)
    assert len(runs) == 12
    for case, (losses, other_norms) in runs.items():
        assert losses == pytest.approx(reference, abs=1e-4), case
        assert other_norms == pytest.approx(norms, rel=1e-3), case


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_fp32_engine_equals_a_plain_pytorch_loop(worlds: Any) -> None:
    from model.gpt import GPT
    from train.optim.adamw import AdamW
    from train.optim.groups import parameter_groups

    torch.manual_seed(0)
    model = GPT(vocabulary_size=VOCABULARY, sequence_length=LENGTH, layers=2, width=32, heads=4)
    optimizer = torch.optim.AdamW(parameter_groups(model, AdamW(3e-3)), lr=3e-3, betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(50):
        (batch,) = make_batches(make_config(), step, 0, 1)
        logits = model(batch["tokens"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert runs_of(worlds, "fp32")[(2, 2, 2)][0] == pytest.approx(losses, abs=1e-4)
    assert runs_of(worlds, "fp32")[(2, 2, 2)][1] == pytest.approx(norms, rel=1e-3)


def test_bf16_losses_agree_between_stages_and_ranks(worlds: Any) -> None:
    runs = runs_of(worlds, "bf16")
    reference, _ = runs[(1, 0, None)]
    assert reference[-1] < reference[0] - 1
    assert len(runs) == 14
    for case, (losses, _) in runs.items():
        assert losses == pytest.approx(reference, abs=2e-2), case


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_state_of_a_rank_shrinks_as_theory_says(worlds: Any, ranks: int, stage: int) -> None:
    """Rajbhandari et al. 2020 (arXiv 1910.02054, section 3 and figure 1), up to padding."""
    for _, found in worlds[ranks]:
        sizes = [math.prod(shape) for shape in found[stage]["shapes"].values()]
        total = sum(sizes)
        shared = total / (ranks if stage > 0 else 1)
        parameters = 2 * total / ranks if stage == 3 else 2 * total
        expected = {"parameters": parameters, "master_weights": 4 * shared, "moments": 8 * shared}
        assert found[stage]["bytes"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_whole_weights_are_saved_once_by_rank_0(worlds: Any, ranks: int) -> None:
    for rank, (_, found) in enumerate(worlds[ranks]):
        for state in found:
            assert state["saved"] == (state["shapes"] if rank == 0 else None)
            assert "head.weight" not in state["shapes"]  # tied to the embedding
