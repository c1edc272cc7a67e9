"""DeepSpeed's configuration follows from the run's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from train.config import EngineConfig, RunConfig
from train.deepspeed_config import derive


def config(**engine: Any) -> RunConfig:
    return RunConfig(global_batch=24, micro_batch=2, engine=EngineConfig(**engine))


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "size", "accumulation"),
    [(2, 1, 2, 12), (2, 3, 2, 4), (2, 12, 2, 1), (None, 1, 24, 1), (None, 4, 6, 1), (24, 1, 24, 1)],
)
def test_accumulation_follows(micro_batch: int | None, world_size: int, size: int, accumulation: int) -> None:
    derived = derive(replace(config(), micro_batch=micro_batch), world_size)
    assert derived["train_batch_size"] == 24
    assert derived["train_micro_batch_size_per_gpu"] == size
    assert derived["gradient_accumulation_steps"] == accumulation
    assert size * accumulation * world_size == 24


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_and_what_it_needs(stage: int) -> None:
    derived = derive(config(zero_stage=stage), 2)
    assert derived["zero_optimization"]["stage"] == stage
    gathers = "stage3_gather_16bit_weights_on_model_save"
    assert derived["zero_optimization"].get(gathers, False) == (stage == 3)
    accumulated = derived.get("data_types", {}).get("grad_accum_dtype")
    assert accumulated == (None if stage == 0 else "fp32")


def test_precision() -> None:
    assert derive(config(precision="bf16"), 2)["bf16"] == {"enabled": True}
    half = derive(config(precision="fp16"), 2)
    assert half["fp16"]["enabled"] and "bf16" not in half
    assert half["fp16"].get("loss_scale", 0) == 0  # dynamic
    assert not derive(config(precision="fp32"), 2).keys() & {"bf16", "fp16"}


def test_clipping_and_offload() -> None:
    derived = derive(config(gradient_clipping=0.5, offload_optimizer=True), 2)
    assert derived["gradient_clipping"] == 0.5
    assert derived["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in derive(config(), 2)["zero_optimization"]


def test_it_is_pure_and_json() -> None:
    first = derive(config(), 2)
    first["zero_optimization"]["stage"] = 9
    assert derive(config(), 2) == derive(config(), 2) != first
    assert json.loads(json.dumps(derive(config(), 2))) == derive(config(), 2)
