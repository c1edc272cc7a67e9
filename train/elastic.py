"""Going on with another number of ranks or another ZeRO stage: the shards of a checkpoint, dealt out anew.

Every rank maps the old shards into memory, puts each parameter together and takes its own part of it, so
that nothing is written and nothing has to fit twice. It follows the layout that DeepSpeed's Universal
Checkpoint reads (https://www.deepspeed.ai/tutorials/universal-checkpointing/), and goes further than that of
0.19.8: between ZeRO 3 and the others and to and from 0, with the states of any elementwise optimizer, and
with each parameter group's own weight decay (under ZeRO-3 that one gives all groups those of the first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.engine import MASTER, TRUSTED, Engine, read, rule_states


@dataclass(frozen=True)
class Shards:
    """A checkpoint's parameters, whichever way they are sharded.

    parameters: yields (name, tensors by MASTER and the optimizer's names, each of the parameter's elements in
    order, flat). scalars: the optimizer's counters. loss_scale: fp16's.
    """

    parameters: Iterator[tuple[str, dict[str, Tensor]]]
    scalars: dict[str, Any]
    loss_scale: float


def redistribute(engine: Engine, folder: Path, zero_stage: int) -> None:
    """Bring an engine of any size and stage to the checkpoint in `folder`, which one of `zero_stage` wrote.

    Raises:
        ValueError: the checkpoint lacks a parameter, has one that the engine does not, or holds what a
            checkpoint does not.
    """
    with torch.serialization.safe_globals(TRUSTED):
        if zero_stage == 0:
            shards = _unsharded(folder, engine.group_names)
        elif zero_stage == 3:
            shards = _stage_3(folder)
        else:
            shards = _stages_1_and_2(folder)
        states = rule_states(folder)
    engine.restore(shards.parameters, shards.scalars, shards.loss_scale, states)


def _unsharded(folder: Path, group_names: list[list[str]]) -> Shards:
    saved = read(folder / "mp_rank_00_model_states.pt")
    wrapped = "optimizer_state_dict" in saved["optimizer"]  # in half precision, beside fp32 masters
    optimizer = saved["optimizer"]["optimizer_state_dict"] if wrapped else saved["optimizer"]
    names = [name for group in group_names for name in group]
    if wrapped:
        masters = dict(
            zip(names, (t for group in saved["optimizer"]["fp32_groups"] for t in group), strict=True)
        )
    else:
        masters = saved["module"]

    def parameters() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for index, name in enumerate(names):
            moments = _tensors(optimizer["state"].get(index, {}))
            yield name, {key: t.flatten() for key, t in {MASTER: masters[name], **moments}.items()}

    return Shards(parameters(), _scalars(optimizer["state"]), float(saved["optimizer"].get("cur_scale", 1.0)))


def _stages_1_and_2(folder: Path) -> Shards:
    ranks = [saved["optimizer_state_dict"] for saved in _optimizer_files(folder)]
    states = [saved["base_optimizer_state"]["state"] for saved in ranks]

    def parameters() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for group in range(len(ranks[0]["single_partition_of_fp32_groups"])):
            names = dict.fromkeys(name for saved in ranks for name in saved["param_slice_mappings"][group])
            for name in names:
                pieces: dict[str, list[Tensor]] = {}
                for saved, state in zip(ranks, states, strict=True):
                    place = saved["param_slice_mappings"][group].get(name)
                    if place is None:
                        continue
                    weights = saved["single_partition_of_fp32_groups"][group]
                    flat = {MASTER: weights, **_tensors(state.get(group, {}))}
                    for key, tensor in flat.items():
                        pieces.setdefault(key, []).append(tensor.narrow(0, place.start, place.numel))
                yield name, {key: torch.cat(parts) for key, parts in pieces.items()}

    return Shards(parameters(), _scalars(states[0]), _loss_scale(ranks[0]))


def _stage_3(folder: Path) -> Shards:
    ranks = [saved["optimizer_state_dict"] for saved in _optimizer_files(folder)]
    states = [saved["optimizer_state_dict"]["state"] for saved in ranks]
    shapes = read(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]

    def parameters() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for group, members in enumerate(shapes):
            offset = 0
            for name, shape in members.items():
                share = -(-shape.numel() // len(ranks))  # of each rank; the last one's is padded
                pieces: dict[str, list[Tensor]] = {}
                for saved, state in zip(ranks, states, strict=True):
                    flat = {MASTER: saved["fp32_flat_groups"][group], **_tensors(state.get(group, {}))}
                    for key, tensor in flat.items():
                        pieces.setdefault(key, []).append(tensor.narrow(0, offset, share))
                offset += share
                yield name, {key: torch.cat(parts)[: shape.numel()] for key, parts in pieces.items()}

    return Shards(parameters(), _scalars(states[0]), _loss_scale(ranks[0]))


def _loss_scale(saved: dict[str, Any]) -> float:
    return float(saved["loss_scaler"].cur_scale) if "loss_scaler" in saved else 1.0


def _optimizer_files(folder: Path) -> list[dict[str, Any]]:
    """Every rank's, in their order."""
    found = {
        int(path.name.split("pp_rank_")[1].split("_")[0]): path for path in folder.glob("*_optim_states.pt")
    }
    return [read(found[rank]) for rank in sorted(found)]


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim()}


def _scalars(states: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The counters of the first group that has states: parameters that are stepped whole have none here."""
    first: dict[str, Any] = next((state for state in states.values() if state), {})
    return {key: value for key, value in first.items() if not (torch.is_tensor(value) and value.dim())}
