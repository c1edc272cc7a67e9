"""The only caller of DeepSpeed: a model and an objective become steps that are sharded over the ranks."""

from __future__ import annotations

import os

if "DS_ACCELERATOR" not in os.environ:
    import torch

    # Where there is no GPU, naming the CPU spares DeepSpeed's search for one and its warnings.
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"

import contextlib
import fcntl
import hashlib
import logging
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from train import deepspeed_config
from train.config import RunConfig

Batch = dict[str, Tensor]

# What a launcher would tell a world of one. The last marks it as ours, for `stop_world` to take back.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "ISOFLOP_ALONE": "1"}


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all ranks, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()


def start_world() -> World:
    """Join the processes that torchrun or deepspeed started; alone, be a world of one."""
    environment = os.environ
    if "RANK" not in environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment.update(ALONE, MASTER_PORT=str(port))
    local_rank = int(environment["LOCAL_RANK"])
    local_size = int(
        environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", environment["WORLD_SIZE"]))
    )
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=".*torch.distributed.*"
    )  # DeepSpeed's own
    if device.type == "cpu":
        _build_operators()
    # Rank 0 may prepare data while the others wait.
    with quiet():
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=2))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device)


def operators_folder() -> Path:
    """Where this environment's compiled operator lies; TORCH_EXTENSIONS_DIR names another parent."""
    place = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "isoflop" / place))
    return Path(os.environ["TORCH_EXTENSIONS_DIR"], "deepspeed_shm_comm")


def _build_operators() -> None:
    """Compile and load the operators that DeepSpeed needs on a CPU, once per environment.

    Torch guards a build by a file that a killed process leaves behind, for which all later ones then wait in
    silence. Here one process at a time builds, in a folder of our own, and clears what another left.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = operators_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "one-at-a-time", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        if not (folder / "deepspeed_shm_comm.so").exists():
            print("compiling DeepSpeed's CPU operators, once: about a minute", flush=True)
        # The build is done again where another ninja made it, so it is always that of this environment.
        search = os.environ.get("PATH", "")
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), search])
        with quiet():
            builder.load(verbose=False)
        os.environ["PATH"] = search


def stop_world() -> None:
    """Leave the process group, so that the process ends without warnings."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if "ISOFLOP_ALONE" in os.environ:
        for name in (*ALONE, "MASTER_PORT"):
            os.environ.pop(name, None)


def end_process() -> None:
    """End a rank's process at once, after everything it holds is closed.

    While Python itself ends, threads of libtorch may still let go of its objects; they are then killed in
    mid-call, and once in a great many times the process of a finished rank aborts ("terminate called without
    an active exception"), which its launcher takes for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    loss_sum: this rank's sum of token losses in nats. count: tokens with loss in the whole global batch.
    gradient_norm: global L2 norm before clipping. skipped: fp16 overflow, parameters unchanged.
    metrics: this rank's sums of what else the objective counts, by name.
    """

    loss_sum: Tensor
    count: int
    gradient_norm: float
    skipped: bool
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Engine:
    """A model trained by an objective under ZeRO.

    Args:
        config: the frozen run config.
        model: fp32, on any device; its parameters are cast and sharded in place.
        objective: see `train.objective`.
        optimizer: over the model's parameters.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        objective: Any,
        optimizer: torch.optim.Optimizer,
        world: World,
    ) -> None:
        self.world, self.objective, self.model = world, objective, model
        self.seed, self.zero_stage = config.seed, config.engine.zero_stage
        self.precision = config.engine.precision
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        model.activation_checkpointing = config.engine.activation_checkpointing  # type: ignore[assignment]
        if config.engine.compile:
            for block in model.blocks:  # type: ignore[union-attr]
                block.compile()
        self.peaks = [group["lr"] for group in optimizer.param_groups]  # the schedule multiplies these
        # In half precision without ZeRO, DeepSpeed takes a step with gradients of zero to allocate the
        # optimizer's state. It must neither decay the weights nor count in Adam's bias correction.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        with quiet():
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepspeed_config.derive(config, world.size)
            )
        if self.zero_stage == 0:
            self.engine.basic_optimizer.state.clear()
        self.set_learning_rate(1.0)

    def set_learning_rate(self, multiplier: float) -> None:
        """Scale every group's peak learning rate for the next step."""
        for peak, group in zip(self.peaks, self.engine.optimizer.param_groups, strict=True):
            group["lr"] = peak * multiplier
        self.learning_rate = self.peaks[0] * multiplier

    def train_step(self, step: int, batches: list[Batch]) -> Step:
        """One optimizer step over this rank's micro batches. Dropout depends on (seed, step, rank) alone."""
        self.engine.train()
        (dropout_seed,) = np.random.SeedSequence((self.seed, step, self.world.rank)).generate_state(1)
        torch.manual_seed(int(dropout_seed))
        batches = [self._to_device(batch) for batch in batches]
        (total,) = self.world.sum(sum(self.objective.count(batch) for batch in batches))
        loss_sum = torch.zeros((), device=self.world.device)
        norm = None
        metrics: dict[str, Tensor] = {}
        for batch in batches:
            batch_sum, _, counts = self.objective(self.engine, batch)
            # DeepSpeed averages gradients over ranks; the objective sums over tokens.
            self.engine.backward(batch_sum * (self.world.size / max(1.0, total)), scale_wrt_gas=False)
            if self.engine.is_gradient_accumulation_boundary():
                norm = self._unsharded_norm()
            self.engine.step()
            loss_sum += batch_sum.detach()
            metrics = {name: value + metrics.get(name, 0) for name, value in counts.items()}
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        skipped = not self.engine.was_step_applied()
        return Step(loss_sum, int(total), float(norm or 0.0), skipped, metrics)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the objective says of one micro batch of this rank: loss sum in nats, count, more sums."""
        self.engine.eval()
        return self.objective(self.engine, self._to_device(batch))

    def save(self, directory: Path, tag: str, state: dict[str, Any]) -> dict[str, Tensor] | None:
        """Write the sharded state to directory/tag (all ranks); returns the whole weights on rank 0."""
        with quiet():
            self.engine.save_checkpoint(str(directory), tag=tag, client_state=state, save_latest=False)
            if self.zero_stage == 3:
                weights = self.engine._zero3_consolidated_16bit_state_dict()
            else:
                weights = self.engine.module.state_dict() if self.world.rank == 0 else None
        if weights is None:
            return None
        names = {name for name, _ in self.model.named_parameters()}  # a tied weight once
        return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items() if name in names}

    def load(self, directory: Path, tag: str) -> dict[str, Any]:
        """Restore what `save` wrote at the same world size; returns its `state`."""
        with quiet():
            path, state = self.engine.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise ValueError(f"{directory / tag}: DeepSpeed found no checkpoint of this world size in it")
        return state

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds between steps: parameters, fp32 master weights and optimizer moments."""
        parameters = list(self.model.parameters())
        # ZeRO-3 holds a share of every parameter, and the small ones whole besides; others are empty here.
        held = parameters + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        optimizer = self.engine.basic_optimizer
        masters = self._master_weights()
        moments = [
            t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()
        ]
        return {"parameters": _bytes(held), "master_weights": _bytes(masters), "moments": _bytes(moments)}

    def _master_weights(self) -> list[Tensor]:
        """The fp32 copies that the optimizer steps; none where it steps the parameters themselves."""
        own = {id(p) for p in self.model.parameters()}
        stepped = [p for group in self.engine.basic_optimizer.param_groups for p in group["params"]]
        if self.zero_stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [p for p in stepped if id(p) not in own]

    def _unsharded_norm(self) -> float | None:
        """Gradient norm in fp32 without ZeRO, which DeepSpeed computes and throws away."""
        if self.zero_stage > 0 or self.precision != "fp32":
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def _to_device(self, batch: Batch) -> Batch:
        return {key: tensor.to(self.world.device, non_blocking=True) for key, tensor in batch.items()}


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what DeepSpeed and its compilers print by themselves off standard output."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
