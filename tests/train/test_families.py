"""Encoders and encoder-decoders train alike under every ZeRO stage, also if a rank has nothing to predict."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from train.config import EngineConfig, Horizon, RunConfig
from train.optim.adamw import AdamW
from train.optim.groups import parameter_groups

STAGES, STEPS, LENGTH, SAMPLES = (0, 1, 3), 3, 16, 4


def make_model(family: str) -> Any:
    from model.bert import BERT
    from model.t5 import T5

    sizes: dict[str, Any] = {
        "vocabulary_size": 64,
        "sequence_length": LENGTH,
        "layers": 2,
        "width": 32,
        "heads": 4,
    }
    torch.manual_seed(0)
    if family == "encoder":
        return BERT(position="sinusoidal", **sizes)
    return T5(buckets=8, max_distance=16, **sizes)


class Fit:
    """The least of an objective: a model's loss of a batch whose names are its arguments."""

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        return int((batch["labels_BT"] != -100).sum())

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        return model(**batch), self.count(batch), {}


def make_batch(family: str, rank: int, size: int) -> dict[str, torch.Tensor]:
    """The rank's part of a batch whose second half has no labels and, but for one sample, is padding."""
    tokens = torch.randint(64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    labels, documents = (tokens * 3 + 1) % 64, torch.zeros(SAMPLES, LENGTH, dtype=torch.int32)
    labels[:, ::2] = labels[SAMPLES // 2 :] = -100
    documents[SAMPLES // 2 + 1 :] = -1
    own = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
    if family == "encoder":
        return {"tokens_BT": tokens[own], "labels_BT": labels[own], "documents_BT": documents[own]}
    targets = {"decoder_BT": tokens.flip(0)[own], "labels_BT": labels[own]}
    return {"inputs_BS": tokens[own], "documents_BS": documents[own], **targets}


def losses(family: str) -> dict[str, list[float]]:
    """The mean loss of each step, under each stage, without and with recomputed activations."""
    from train.engine import Engine, start_world

    world = start_world()
    results: dict[str, list[float]] = {}
    for stage in STAGES:
        for again in (False, True):
            engine_config = EngineConfig(
                threads=1, zero_stage=stage, precision="fp32", activation_checkpointing=again
            )
            config = RunConfig(
                sequence_length=LENGTH,
                global_batch=SAMPLES,
                horizon=Horizon(steps=STEPS),
                engine=engine_config,
            )
            model = make_model(family)
            rule = AdamW(learning_rate=1e-2)
            engine = Engine(config, model, Fit(), rule, parameter_groups(model, rule), world)
            results[f"{stage} {again}"] = []
            for step in range(STEPS):
                engine.set_learning_rate(1.0)
                result = engine.train_step(step, [make_batch(family, world.rank, world.size)])
                (total,) = world.sum(result.loss_sum)
                results[f"{stage} {again}"].append(total / result.count)
    return results


@pytest.mark.parametrize("family", ["encoder", "encoder-decoder"])
def test_losses_depend_on_neither_stage_nor_ranks(family: str) -> None:
    model, batch = make_model(family), make_batch(family, 0, 1)
    optimizer = torch.optim.AdamW(parameter_groups(model, AdamW(1e-2)), lr=1e-2, betas=(0.9, 0.95))
    expected = []
    for _ in range(STEPS):
        loss = model(**batch) / (batch["labels_BT"] != -100).sum()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for rank in run_ranks(losses, 2, family):
        for way, found in rank.items():
            assert found == pytest.approx(expected, rel=1e-4), way
