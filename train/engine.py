"""The only caller of DeepSpeed: a model and an objective become steps that are sharded over the ranks."""

from __future__ import annotations

import os

if "DS_ACCELERATOR" not in os.environ:
    import torch

    # Where there is no GPU, naming the CPU spares DeepSpeed's search for one and its warnings.
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"

import contextlib
import copy
import fcntl
import hashlib
import logging
import math
import pickle
import socket
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO, UNIVERSAL_CHECKPOINT_VERSION_KEY
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from train import deepspeed_config
from train.config import RunConfig
from train.optim.base import Rule
from train.whole import Piece, Whole

Batch = dict[str, Tensor]

Accept = Callable[[float, float], bool]

# What a launcher would tell a world of one. The last marks it as ours, for `stop_world` to take back.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "ISOFLOP_ALONE": "1"}

PATIENCE = timedelta(hours=2)  # of a rank with the others: rank 0 may prepare data while they wait
RULE = "rule_rank_{}.pt"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of DeepSpeed's engine
MASTER = "fp32"  # the name of a parameter's fp32 weights beside those of the optimizer's states

# Besides tensors and plain containers, all that DeepSpeed's checkpoints hold.
TRUSTED = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: Any = None  # a process group of the CPUs, for what the ranks agree on

    def agree(self, *values: int) -> list[int]:
        """The greatest of each value over all ranks."""
        greatest = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=self.control)
        return greatest.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all ranks, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
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
    # DeepSpeed's launcher says LOCAL_SIZE, for which its collectives go through shared memory, that killed
    # ranks leave behind and in which the others wait for them for ever.
    local_size = int(
        environment.get("LOCAL_WORLD_SIZE") or environment.pop("LOCAL_SIZE", environment["WORLD_SIZE"])
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
    with quiet():
        one_node = environment.get("GROUP_WORLD_SIZE", "1") == "1"  # of several, each counts its own restarts
        if one_node and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(
                get_accelerator().communication_backend_name(),
                store=_agent_store(),
                timeout=PATIENCE,
                rank=int(environment["RANK"]),
                world_size=int(environment["WORLD_SIZE"]),
            )
        deepspeed.init_distributed(verbose=False, timeout=PATIENCE)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device, control)


def _agent_store() -> dist.Store:
    """A part for this start of the ranks in the store that their launcher hosts.

    Torch's own way (env://) finds there the addresses of the ranks that `torchrun --max-restarts` replaces.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    start = [os.environ.get(f"TORCHELASTIC_{key}", "") for key in ("RUN_ID", "RESTART_COUNT")]
    return dist.PrefixStore("/".join(["isoflop", *start]), dist.TCPStore(address, port, timeout=PATIENCE))


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


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    loss_sum: this rank's sum of token losses in nats. count: tokens with loss in the whole global batch.
    gradient_norm: global L2 norm before clipping. skipped: no update was made, for the gradients overflowed
    or were not accepted.
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
        rule: makes the optimizer. groups: the model's parameters for it: see `train.optim.groups`.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        objective: Any,
        rule: Rule,
        groups: list[dict[str, Any]],
        world: World,
    ) -> None:
        self.world, self.objective, self.model, self.rule = world, objective, model, rule
        self.seed, self.zero_stage = config.seed, config.engine.zero_stage
        self.precision = config.engine.precision
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        model.activation_checkpointing = config.engine.activation_checkpointing  # type: ignore[assignment]
        if config.engine.compile:
            for block in model.blocks:  # type: ignore[union-attr]
                block.compile()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = rule(groups, config.engine.offload_optimizer)
        members = [list(group["params"]) for group in optimizer.param_groups]
        self.group_names = [[names[id(parameter)] for parameter in group] for group in members]
        whole = []
        for group, own, asked in zip(optimizer.param_groups, self.group_names, groups, strict=True):
            group["names"] = own  # which DeepSpeed replaces by flat tensors
            if asked.get("whole"):  # without what the elementwise optimizer has entered
                whole.append({**asked, "names": own, "lr": group["lr"]})
        self._named = dict(model.named_parameters())
        shapes = {name: parameter.shape for name, parameter in self._named.items()}
        self._group_of = {id(parameter): i for i, group in enumerate(members) for parameter in group}
        self.peaks = [group["lr"] for group in optimizer.param_groups]  # the schedule multiplies these
        # In half precision without ZeRO, DeepSpeed steps once with gradients of zero to allocate the states:
        # that must neither decay the weights nor count in Adam's bias correction.
        self._step_elementwise = optimizer.step
        optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
        self._whole: Whole | None = None
        with quiet():
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=deepspeed_config.derive(config, world.size)
            )
        optimizer = self.engine.basic_optimizer
        if self.zero_stage in (1, 2):
            self._flats = [group["params"][0] for group in optimizer.param_groups]
        if self.zero_stage == 0:
            # In half precision the optimizer steps fp32 copies in their places.
            stepped = [group["params"] for group in optimizer.param_groups]
            self._stepped = {
                id(own): copy
                for mine, copies in zip(members, stepped, strict=True)
                for own, copy in zip(mine, copies, strict=True)
            }
        if self.zero_stage == 3:
            self._clear_padding()
        # DeepSpeed's optimizers all end in this call, at which the gradient norm is known on every rank.
        optimizer.step = self._judged_update  # type: ignore[method-assign]
        if whole:
            self._whole = Whole(
                whole,
                self.rule.whole,
                self.rule.counters,
                lambda name: self._piece(self._named[name]),
                shapes,
                ranks=world.size,
                rank=world.rank,
                device=world.device,
                replicated=self.zero_stage == 0,
            )
        self.engine._copy_recovery_script = lambda folder: None  # model.safetensors needs none
        self.set_learning_rate(1.0)

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """Zero what ZeRO-3 adds to a parameter that the ranks cannot share evenly, and leaves as found."""
        optimizer = self.engine.optimizer
        for parameter in self.model.parameters():
            group, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            piece = self._piece(parameter)
            own = piece.count if piece else 0
            parameter.ds_tensor.view(-1)[own:].zero_()  # type: ignore[attr-defined]
            optimizer.fp32_partitioned_groups_flat[group].narrow(0, start + own, count - own).zero_()

    def set_learning_rate(self, multiplier: float) -> None:
        """Scale every group's peak learning rate for the next step."""
        for peak, group in zip(self.peaks, self.engine.optimizer.param_groups, strict=True):
            group["lr"] = peak * multiplier
        self.learning_rate = self.rule.learning_rate * multiplier

    def train_step(
        self,
        step: int,
        batches: list[Batch],
        accept: Accept = lambda loss, norm: True,
        counted: bool = True,
    ) -> Step:
        """One optimizer step over this rank's micro batches. Dropout depends on (seed, step, rank) alone.

        accept: given the global mean loss in nats and the gradient norm (infinite or NaN where it
        overflowed), the same on all ranks, says whether the update is made. counted: this rank's batches are
        part of the step; False only takes part in what all ranks do together.
        """
        self.engine.train()
        (dropout_seed,) = np.random.SeedSequence((self.seed, step, self.world.rank)).generate_state(1)
        torch.manual_seed(int(dropout_seed))
        batches = [self._to_device(batch) for batch in batches]
        (total,) = self.world.sum(counted * sum(self.objective.count(batch) for batch in batches))
        loss_sum = torch.zeros((), device=self.world.device)
        metrics: dict[str, Tensor] = {}
        self._verdict: bool | None = None
        self._norm: float | None = None
        self._scale = self._missing_loss_scale()
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            batch_sum, _, counts = self.objective(self.engine, batch)
            # DeepSpeed averages gradients over ranks; the objective sums over tokens.
            factor = counted * self._scale * self.world.size / max(1.0, total)
            self.engine.backward(batch_sum * factor, scale_wrt_gas=False)
            loss_sum += counted * batch_sum.detach()
            metrics = {name: value + metrics.get(name, 0) for name, value in counts.items()}
            if self.engine.is_gradient_accumulation_boundary():
                self._norm = self._unsharded_norm()
                mean = self.world.sum(loss_sum)[0] / max(1.0, total)
                self._accept = partial(accept, mean)
            self.engine.step()
        if self._verdict is None:  # the gradients overflowed, and DeepSpeed dropped them
            self._norm = math.inf
            # In fp16 they do so now and then: the loss scale is lowered, and only the loss is judged.
            self._accept(0.0 if self.precision == "fp16" else math.inf)
        return Step(loss_sum, int(total), self._norm or 0.0, not self._verdict, metrics)

    def part_of_step(self, step: int, batches: list[Batch]) -> Step:
        """What `train_step` of a part of the global batch would tell. Nothing of it stays behind.

        The part is the first micro batch of each rank; where there is no other, that of half of the ranks.
        """
        counters = {name: getattr(self.engine, name) for name in COUNTERS}
        scaler = vars(self._loss_scaler) if self._loss_scaler else {}
        scale = dict(scaler)
        counted = len(batches) > 1 or self.world.rank < self.world.size // 2
        result = self.train_step(step, batches[:1], lambda loss, norm: False, counted)
        vars(self.engine).update(counters)
        scaler.update(scale)
        return result

    def _judged_update(self) -> None:
        """Stands in for the optimizer's step, which ZeRO calls once per group of parameters."""
        if self._verdict is None:
            if self._norm is None:
                norm = float(self.engine.optimizer._global_grad_norm) / self._scale
                self._norm = math.nan if norm < 0 else norm  # DeepSpeed's sign for one that is not finite
            self._verdict = self._accept(self._norm)
        return self._update() if self._verdict else None

    def _update(self) -> None:
        """Step the groups that DeepSpeed shows, one or all of them."""
        optimizer = self.engine.basic_optimizer
        shown = optimizer.param_groups
        # A library may count the steps of a group in it, so that it is shown those alone that are stepped.
        optimizer.param_groups = [g for g in shown if g["params"] and not g.get("whole")]
        if optimizer.param_groups:
            self._step_elementwise()
        optimizer.param_groups = shown
        for group in shown:
            if group["params"] and group.get("whole"):
                assert self._whole is not None
                self._whole.step(group)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the objective says of one micro batch of this rank: loss sum in nats, count, more sums."""
        self.engine.eval()
        return self.objective(self.engine, self._to_device(batch))

    def snapshot(self, aside: bool) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """What a checkpoint holds of this rank (all ranks call it): file names to what `torch.save` writes to
        them, and on rank 0 the whole weights. aside: as copies that later steps leave alone."""
        files = _Files(aside)
        self.engine.checkpoint_engine = files
        state = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: 0.2}}
        with quiet():
            self.engine.save_checkpoint("/", tag="", client_state=state, save_latest=False)
        if self.rule.counters or self._whole:
            files.save(self._rule_state(), RULE.format(self.world.rank))
        aside = aside or self.rule.averages  # which are others again behind this
        with quiet(), self.averaged():
            if self.zero_stage == 3:
                weights = self.engine._zero3_consolidated_16bit_state_dict()
            else:
                weights = self.engine.module.state_dict() if self.world.rank == 0 else None
            if weights is None:
                return files.found, None
            names = {name for name, _ in self.model.named_parameters()}  # a tied weight once
            found = {name: _on_cpu(tensor, aside) for name, tensor in weights.items() if name in names}
        return files.found, found

    def load(self, folder: Path) -> None:
        """Restore what an engine of this size and stage gave as `snapshot`, from its files.

        Raises:
            ValueError: the files do not fit this engine, or hold what a checkpoint does not.
        """
        self.engine.checkpoint_engine = _Files(aside=False)
        groups = self.engine.basic_optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        try:
            with quiet(), torch.serialization.safe_globals(TRUSTED):
                path, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except pickle.UnpicklingError:
            raise ValueError(
                f"{folder}: refused to load it, for it holds what a checkpoint does not"
            ) from None
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint of this world size in it")
        # The settings are those of the config, which a fork's are not in the checkpoint.
        for group, own in zip(self.engine.basic_optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.zero_stage in (1, 2):
            self.engine.optimizer.clip_grad = self.engine.gradient_clipping()
        self._load_rule_state(rule_states(folder))

    def restore(
        self,
        parameters: Iterable[tuple[str, dict[str, Tensor]]],
        scalars: dict[str, Any],
        loss_scale: float,
        rule_states: list[dict[str, Any]],
    ) -> None:
        """Take this rank's part of whole parameters (see `train.elastic.Shards`).

        Raises:
            ValueError: one is missing, or unknown.
        """
        if self.zero_stage == 3:
            self.engine.optimizer.checkpoint_event_prologue()  # no whole parameter stays gathered
        own = dict(self.model.named_parameters())
        missing = set(own)
        for name, tensors in parameters:
            if name not in own:
                raise ValueError(f"{name}: is in the checkpoint, but not in the model")
            missing.discard(name)
            self._assign(own[name], tensors)
        if missing:
            raise ValueError(f"{min(missing)}: is in the model, but not in the checkpoint")
        optimizer = self.engine.optimizer
        for stepped, state in self.engine.basic_optimizer.state.items():
            for key, value in scalars.items():
                state[key] = value.to(stepped.device, copy=True) if torch.is_tensor(value) else value
        self._load_rule_state(rule_states)
        if self.zero_stage == 3:
            self._reassign()
            optimizer.checkpoint_event_epilogue()
        if self.precision == "fp16":
            self._loss_scaler.cur_scale = loss_scale

    @property
    def loads_own_layout(self) -> bool:
        """Whether `load` restores all of its own snapshot. DeepSpeed's loading wants states of all groups."""
        return self._whole is None and self.rule.keeps_state

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the weights that are evaluated, where its rule steps others. All ranks call it."""
        if not self.rule.averages:
            yield
            return
        pieces = self._stepped_tensors()
        kept = [holder.detach().clone() for holder, _ in pieces]
        state = self.engine.basic_optimizer.state
        with torch.no_grad():
            for holder, group in pieces:
                self.rule.average(holder.data, state.get(holder, {}), group)
        self._refresh()
        try:
            yield
        finally:
            for (holder, _), weights in zip(pieces, kept, strict=True):
                holder.data.copy_(weights)
            self._refresh()

    def _stepped_tensors(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """What the optimizer steps on this rank, each with its group."""
        groups = self.engine.basic_optimizer.param_groups
        if self.zero_stage < 3:
            return [(tensor, group) for group in groups for tensor in group["params"]]
        flats, group_of = self.engine.optimizer.fp32_partitioned_groups_flat, self.engine.optimizer
        return [(flat, groups[group_of.sub_group_to_group_id[i]]) for i, flat in enumerate(flats)]

    @torch.no_grad()
    def _refresh(self) -> None:
        """Have the model's weights be those that the optimizer steps."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 3:
            optimizer.checkpoint_event_prologue()  # no whole parameter stays gathered
            self._reassign()
            optimizer.checkpoint_event_epilogue()
        elif self.zero_stage > 0:
            optimizer.update_lp_params()
        else:
            for parameter in self.model.parameters():
                parameter.copy_(self._stepped[id(parameter)])

    def _reassign(self) -> None:
        """Under ZeRO-3, the model's shares become those of the fp32 weights."""
        for group in range(len(self.engine.optimizer.fp16_groups)):
            self.engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _rule_state(self) -> dict[str, Any]:
        """What DeepSpeed does not save: what is counted in groups, by their first name, and whole states."""
        counters = {
            group["names"][0]: {key: group[key] for key in self.rule.counters if key in group}
            for group in self.engine.basic_optimizer.param_groups
        }
        return {"counters": counters, "whole": self._whole.state() if self._whole else None}

    def _load_rule_state(self, saved: list[dict[str, Any]]) -> None:
        for group in self.engine.basic_optimizer.param_groups:
            for one in saved:
                group.update(one["counters"].get(group["names"][0], {}))
        if self._whole is not None:
            self._whole.load_state(one["whole"] for one in saved if one["whole"])

    def _assign(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """This rank's part of one parameter: its fp32 weight, its copy in half precision, its moments."""
        if self.zero_stage < 3:
            parameter.data.copy_(tensors[MASTER].view_as(parameter))
        piece = self._piece(parameter)
        if piece is not None:
            state = self.engine.basic_optimizer.state
            for key, whole in tensors.items():
                piece.of(_state_of(state, piece.holder, key)).copy_(piece.within(whole))

    def _piece(self, parameter: nn.Parameter) -> Piece | None:
        """What lies of a parameter on this rank; None where nothing does."""
        if self.zero_stage == 0:
            return Piece(self._stepped[id(parameter)], 0, 0, parameter.numel())
        if self.zero_stage == 3:
            optimizer = self.engine.optimizer
            group, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = count * self.world.rank  # the last ranks' shares are padded
            own = min(count, parameter.ds_numel - first)  # type: ignore[attr-defined]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return Piece(flat, start, first, own) if own > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return Piece(self._flats[self._group_of[id(parameter)]], there.start, here.start, here.numel)

    def count_steps(self) -> tuple[Counter[str], Counter[str]]:
        """How often this rank steps each parameter from now on, by its name: whole, and in shares."""
        shares: Counter[str] = Counter()

        def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            shares.update(name for group in optimizer.param_groups for name in group["names"])

        self.engine.basic_optimizer.register_step_post_hook(step)
        return self._whole.count_steps() if self._whole else Counter(), shares

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
        moments += self._whole.tensors() if self._whole else []
        return {"parameters": _bytes(held), "master_weights": _bytes(masters), "moments": _bytes(moments)}

    def _master_weights(self) -> list[Tensor]:
        """The fp32 copies that the optimizer steps; none where it steps the parameters themselves."""
        own = {id(p) for p in self.model.parameters()}
        stepped = [p for group in self.engine.basic_optimizer.param_groups for p in group["params"]]
        if self.zero_stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [p for p in stepped if id(p) not in own]

    @property
    def _loss_scaler(self) -> Any:
        """What holds the loss scale of fp16 and counts steps; None in fp32 without ZeRO."""
        optimizer = self.engine.optimizer
        return getattr(optimizer, "loss_scaler" if self.zero_stage else "loss_scale_config", None)

    def _missing_loss_scale(self) -> float:
        """In fp16 without ZeRO, DeepSpeed 0.19.8 divides gradients by a scale that it never multiplied by."""
        unscaled = self.precision == "fp16" and self.zero_stage == 0
        return self.engine.optimizer.loss_scale if unscaled else 1.0

    def _unsharded_norm(self) -> float | None:
        """Gradient norm in fp32 without ZeRO, which DeepSpeed computes and throws away."""
        if self.zero_stage > 0 or self.precision != "fp32":
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def _to_device(self, batch: Batch) -> Batch:
        return {key: tensor.to(self.world.device, non_blocking=True) for key, tensor in batch.items()}


def _state_of(states: dict[Tensor, dict[str, Any]], holder: Tensor, key: str) -> Tensor:
    """A state of fp32 weights by name, or under MASTER these themselves."""
    if key == MASTER:
        return holder.data
    return states[holder].setdefault(key, torch.zeros_like(holder.data))


def rule_states(folder: Path) -> list[dict[str, Any]]:
    """Of every rank, what a checkpoint holds beside DeepSpeed's files. Raises ValueError on anything else."""
    return [read(path) for path in sorted(folder.glob(RULE.format("*")))]


def read(path: Path) -> dict[str, Any]:
    """A file of a checkpoint, mapped into memory. Raises ValueError where it holds what none does."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused to load it, for it holds what a checkpoint does not") from None


class _Files(CheckpointEngine):
    """Stands between DeepSpeed and the disk: keeps what it would write, unpickles only what is harmless."""

    def __init__(self, aside: bool) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}
        self._aside = aside

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a state under its file's name."""
        self.found[Path(path).name] = _kept(state_dict, self._aside)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a state. Raises pickle.UnpicklingError on classes other than TRUSTED."""
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: Any) -> bool:
        return True


def _kept(state: Any, aside: bool) -> Any:
    """A state as it is now: its containers anew, its tensors on the CPU."""
    if isinstance(state, Tensor):
        return _on_cpu(state, aside)
    if type(state) in (dict, OrderedDict):
        return type(state)((key, _kept(value, aside)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_kept(value, aside) for value in state)
    return copy.deepcopy(state)


def _on_cpu(tensor: Tensor, aside: bool) -> Tensor:
    """In memory of its own where it must last, or where a file would hold more than what it shows."""
    tensor = tensor.detach()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    on_cpu = tensor.cpu().contiguous()
    same = on_cpu.data_ptr() == tensor.data_ptr()
    return on_cpu.clone() if same and (aside or not whole) else on_cpu


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what DeepSpeed and its compilers print by themselves off standard output."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
