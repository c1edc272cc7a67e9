"""The config: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from train import config as configs
from train.config import (
    RunConfig,
    changed,
    check_world,
    from_hydra,
    load,
    micro_batch,
    to_container,
    total_steps,
)

CONF = str(Path(__file__).resolve().parents[2] / "conf")


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return from_hydra(compose("config", overrides=list(overrides)))


def test_the_defaults_compose() -> None:
    config = composed()
    assert config.horizon.epochs == 1 and config.directory == "runs/run"
    assert config.model["sequence_length"] == config.sequence_length


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+engine.zero=1", "engine.zero: no such key; it has ranks, zero_stage"),
        ("+colour=red", "colour: no such key"),
        ("sequence_length=many", "sequence_length: "),
        ("engine.compile=maybe", "engine.compile: "),
        ("sequence_length=0", "sequence_length: 0 is not a positive number"),
        ("horizon.steps=5", "horizon: steps and epochs are set; set exactly one"),
        ("horizon.epochs=null", "horizon: nothing is set"),
        ("engine.zero_stage=4", "engine.zero_stage: 4 is none of 0, 1, 2, 3"),
        ("engine.precision=int8", "engine.precision: int8 is none of bf16, fp16, fp32"),
        ("track.wandb=sometimes", "track.wandb: sometimes is none of"),
        ("engine.gradient_clipping=-1", "engine.gradient_clipping: is negative"),
        ("checkpoint.keep=0", "checkpoint.keep: 0 is not a positive number"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        composed(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_pairs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="engine.offload_optimizer: needs ZeRO"):
        composed("engine.zero_stage=0", "engine.offload_optimizer=true")
    with pytest.raises(ValueError, match="engine.compile: cannot be combined with engine.zero_stage=3"):
        composed("engine=zero3", "engine.compile=true")


def test_the_global_batch_must_divide() -> None:
    config = composed("global_batch=12", "micro_batch=4")
    assert micro_batch(config, 3) == 4
    check_world(config, 3)
    with pytest.raises(ValueError, match="global_batch: 12 is not divisible by micro_batch 4 x 2 ranks"):
        check_world(config, 2)
    with pytest.raises(ValueError, match="global_batch: 2 cannot be shared by 4 ranks; choose a number of"):
        check_world(composed("global_batch=2"), 4)


def test_fp16_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="engine.precision: fp16 needs a GPU"):
        configs.check_device(composed("engine.precision=fp16"))


@pytest.mark.parametrize(
    ("horizon", "steps"),
    [("steps=7", 7), ("tokens=8193", 3), ("tokens=8192", 2), ("epochs=1.5", 15), ("epochs=1", 10)],
)
def test_the_horizon_in_steps(horizon: str, steps: int) -> None:
    config = composed("horizon.epochs=null", f"horizon.{horizon}", "global_batch=16", "sequence_length=256")
    assert total_steps(config, samples=160) == steps


def test_a_frozen_config_survives_its_file(tmp_path: Path) -> None:
    config = composed("experiment=demo")
    OmegaConf.save(to_container(config), tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    with pytest.raises(ValueError, match="no such file; is .* the directory of a run"):
        load(tmp_path / "absent" / "config.yaml")


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("model.width=64", ["model.width"]),
        ("model=gpt-nano", None),
        ("seed=1", ["seed"]),
        ("tokenizer.vocabulary_size=300", ["tokenizer.vocabulary_size"]),
        ("data.directory=elsewhere", []),
        ("log.every=1", []),
        ("checkpoint.keep=9", []),
        ("horizon.epochs=2", []),
        ("engine.ranks=2", []),
    ],
)
def test_what_a_resumed_run_may_change(override: str, keys: list[str] | None) -> None:
    found = changed(composed(), composed(override))
    assert found == keys if keys is not None else "model.layers" in found and "model.width" in found


def test_every_field_is_in_the_yaml() -> None:
    """A default that only Python knows would be missing from --help and --cfg job."""

    def keys(node: Any, prefix: str = "") -> set[str]:
        if not isinstance(node, dict):
            return set()
        return {prefix + k for k in node} | {k for n in node for k in keys(node[n], f"{prefix}{n}.")}

    with initialize_config_dir(CONF, version_base="1.3"):
        shown = keys(OmegaConf.to_container(compose("config")))
    assert keys(to_container(RunConfig())) <= shown
