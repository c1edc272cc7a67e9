"""The engine on real ranks: what is computed does not depend on how it is split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from train.config import EngineConfig, Horizon, RunConfig

VOCABULARY, LENGTH, GLOBAL_BATCH = 64, 16, 8


def make_config(global_batch: int = GLOBAL_BATCH, micro_batch: int | None = None, **engine: Any) -> RunConfig:
    return RunConfig(
        sequence_length=LENGTH,
        global_batch=global_batch,
        micro_batch=micro_batch,
        horizon=Horizon(steps=1),
        engine=EngineConfig(**engine),
    )


def make_engine(config: RunConfig, dropout: float = 0.0) -> Any:
    from model.gpt import GPT
    from train.engine import Engine, start_world
    from train.objective.causal import Causal
    from train.optim.adamw import AdamW
    from train.optim.groups import decay_groups

    world = start_world()
    torch.manual_seed(0)
    model = GPT(vocabulary_size=VOCABULARY, sequence_length=LENGTH, layers=2, width=32, heads=4, dropout=dropout)
    optimizer = AdamW(learning_rate=3e-3)(decay_groups(model, 0.1), offload=False)
    return Engine(config, model, Causal(), optimizer, world)


def make_batches(config: RunConfig, step: int, rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of a global batch that depends on the step alone; sequences differ in tokens with loss."""
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


@pytest.fixture(scope="module")
def fp32_runs() -> dict[tuple[int, int, int | None], tuple[list[float], list[float]]]:
    """Losses and norms of 50 fp32 steps by (ranks, ZeRO stage, micro batch)."""
    runs = {}
    for ranks in (1, 2):
        cases = [(stage, micro) for stage in (0, 1, 2, 3) for micro in (None, 2)]
        configs = [make_config(precision="fp32", zero_stage=stage, micro_batch=micro) for stage, micro in cases]
        results = run_ranks(losses_and_norms, ranks, configs, 50)
        assert all(result == results[0] for result in results)
        runs.update({(ranks, *case): result for case, result in zip(cases, results[0], strict=True)})
    return runs


def test_fp32_losses_do_not_depend_on_ranks_stage_or_micro_batch(fp32_runs: Any) -> None:
    reference, norms = fp32_runs[(1, 0, None)]
    assert reference[-1] < reference[0] - 1  # it learns, so agreement is not that of a standstill
    assert all(norm > 0 for norm in norms)
    for case, (losses, other_norms) in fp32_runs.items():
        assert losses == pytest.approx(reference, abs=1e-4), case
        assert other_norms == pytest.approx(norms, rel=1e-3), case


def test_fp32_engine_equals_a_plain_pytorch_loop(fp32_runs: Any) -> None:
    from model.gpt import GPT
    from train.optim.groups import decay_groups

    torch.manual_seed(0)
    model = GPT(vocabulary_size=VOCABULARY, sequence_length=LENGTH, layers=2, width=32, heads=4)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95))
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
    assert fp32_runs[(2, 2, 2)][0] == pytest.approx(losses, abs=1e-4)
    assert fp32_runs[(2, 2, 2)][1] == pytest.approx(norms, rel=1e-3)


def test_bf16_losses_agree_between_stages_and_ranks() -> None:
    runs = []
    for ranks in (1, 2):
        configs = [make_config(zero_stage=stage) for stage in (0, 1, 2, 3)]
        runs += run_ranks(losses_and_norms, ranks, configs, 50)[0]
    reference = runs[0][0]
    assert reference[-1] < reference[0] - 1
    for losses, _ in runs:
        assert losses == pytest.approx(reference, abs=2e-2)
