"""What a device can do, by its datasheet or measured, and what a step has to send to other devices."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import torch
from omegaconf import DictConfig, OmegaConf

from launch.memory import Planned
from launch.request import CONF
from train.config import accumulation
from train.hardware import DTYPES, device_name, peak_flops, total_memory

HERE = "here"
BOTH_WAYS = 2  # an all-reduce is a reduce-scatter and an all-gather (ZeRO: arXiv 1910.02054, section 7.1)


@dataclass(frozen=True)
class Hardware:
    """A device and its kind of node.

    memory: bytes. peak: FLOP/s of matrix products, by precision; None: it has no such arithmetic. link,
    network: bytes/s that a device sends to the others of its node, and to other nodes; None: not known.
    devices: of a node. cpu: its ranks share one memory. measured: the peak is, and not by a datasheet.
    """

    name: str
    memory: float
    peak: dict[str, float | None]
    link: float | None
    network: float | None
    devices: int
    cpu: bool = False
    measured: bool = False


def hardware(name: str, precision: str) -> Hardware:
    """A file of conf/hardware, or this machine, whose peak in `precision` is measured where it is a CPU.

    Raises:
        ValueError: there is no such file.
    """
    if name == HERE:
        return _this_machine(precision)
    path = CONF / "hardware" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in path.parent.glob("*.yaml")))
        raise ValueError(f"plan.hardware: {name} is none of {HERE}, {known}; choose one")
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    assert set(node) <= {field.name for field in fields(Hardware)}, path
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    return Hardware(name, **{str(key): value for key, value in values.items()})


def _this_machine(precision: str) -> Hardware:
    if torch.cuda.is_available():
        peaks, devices = {precision: peak_flops(precision)}, torch.cuda.device_count()
        return Hardware(device_name(), total_memory(), peaks, None, None, devices)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peaks = {precision: None if precision == "fp16" else peak_flops(precision)}
    return Hardware(device_name(), total_memory(), peaks, None, None, 1, cpu=True, measured=True)


def sent(planned: Planned) -> dict[str, float]:
    """Bytes that a rank sends in a step of its config's micro batches, by what for: 0 on one rank.

    Around a ring, (ranks - 1) / ranks of the bytes that are reduced or gathered. DeepSpeed all-reduces
    gradients, in ZeRO-2 those of every micro batch, and from ZeRO-1 on gathers what was stepped. ZeRO-3
    gathers the weights twice and reduces gradients to their owners in every micro batch (section 7.2).
    """
    config, ranks = planned.config, planned.ranks
    size = DTYPES[config.engine.precision].itemsize * (ranks - 1) / ranks
    total = sum(parameter.numel() for parameter in planned.model.parameters())
    passes, stage = accumulation(config, ranks), config.engine.zero_stage
    if stage == 3:
        return {"weights": 2.0 * passes * total * size, "gradients": 1.0 * passes * total * size}
    reductions = passes if stage == 2 else 1
    gathered = total * size if stage else 0.0
    return {"weights": gathered, "gradients": BOTH_WAYS * reductions * total * size}
