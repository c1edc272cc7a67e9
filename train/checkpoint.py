"""Checkpoints: complete under their name or not there at all, the newest few kept.

checkpoints/step-00000100/ holds DeepSpeed's sharded state, and model.safetensors: the whole weights, which
need neither DeepSpeed nor the same number of ranks to be read.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from train.engine import Engine

PREFIX = "step-"
WEIGHTS = "model.safetensors"


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    numbers = (path.name.removeprefix(PREFIX) for path in directory.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(number) for number in numbers if number.isdecimal())


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:08d}"


def save(engine: Engine, directory: Path, step: int, keep: int) -> None:
    """Write the checkpoint of `step`, then drop all but the newest `keep`. Called by all ranks."""
    aside = directory / f".{PREFIX}{step:08d}"
    if engine.world.rank == 0:
        for left_over in directory.glob(f".{PREFIX}*"):
            shutil.rmtree(left_over)
    engine.world.barrier()
    weights = engine.save(directory, aside.name, {"step": step})
    if weights is not None:
        save_file(weights, aside / WEIGHTS)
        target = path_of(directory, step)
        if target.exists():
            shutil.rmtree(target)
        os.rename(aside, target)
        for old in steps(directory)[:-keep]:
            shutil.rmtree(path_of(directory, old))
    engine.world.barrier()


def restore(engine: Engine, directory: Path) -> int:
    """Bring the engine to the newest checkpoint; returns its step, 0 where there is none."""
    found = engine.world.broadcast(steps(directory))
    if not found:
        return 0
    return engine.load(directory, path_of(directory, found[-1]).name)["step"]


def load_weights(model: nn.Module, directory: Path, step: int | None = None) -> int:
    """Load the whole weights of a checkpoint (the newest, or that of `step`) into a model on any device.

    Returns the step. Raises ValueError where there is no such checkpoint or it is of another model.
    """
    found = steps(directory)
    if not found or (step is not None and step not in found):
        there = f"there are {', '.join(map(str, found))}" if found else "there is none"
        raise ValueError(f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    chosen = found[-1] if step is None else step
    path = path_of(directory, chosen) / WEIGHTS
    weights = load_file(path)
    own = dict(model.named_parameters())
    if weights.keys() != own.keys() or any(weights[name].shape != own[name].shape for name in own):
        raise ValueError(f"{path}: holds another model than config.yaml says")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return chosen
