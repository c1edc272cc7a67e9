"""Run a function on several ranks of the real engine, each a process of its own."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each rank; it must be importable. A rank's error is raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _rank, (world_size, port, folder, function, arguments), nprocs=world_size, start_method="spawn"
        )
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    from train.engine import start_world, stop_world
    from train.ranks import end_with

    _share_out_everything()
    start_world()
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(*arguments)))
    stop_world()
    end_with(lambda: None)


def _share_out_everything() -> None:
    """Have ZeRO-3 partition small parameters too, as it does those of models of a real size."""
    from train import deepspeed_config

    derived = deepspeed_config._zero

    def zero(config: Any) -> dict[str, Any]:
        smallest = {"stage3_param_persistence_threshold": 0} if config.engine.zero_stage == 3 else {}
        return derived(config) | smallest

    deepspeed_config._zero = zero
