"""What a rank keeps of the parameters, from their shapes: weights, gradients, the rule's state, buckets.

Follows DeepSpeed 0.19.8, class by class (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054, section 5, whose K
is what the rule keeps, and the fp32 weights). The rule's own state is found by running it on tensors without
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from launch.memory_pass import Tracker
from train import deepspeed_config
from train.config import RunConfig
from train.hardware import DTYPES
from train.optim.base import Groups, Rule
from train.whole import owners

# DeepSpeed's defaults (deepspeed/runtime/zero/config.py), in elements.
BUCKET = 500_000_000  # of gradients that are reduced together
MOST_GATHERED = 1_000_000_000  # of ZeRO-3's parameters that are whole at a time
PERSISTENT = 100_000  # ZeRO-3 keeps smaller parameters whole
ALIGNMENT = 2  # of a rank's share
FULL, HALF = 4, 2  # bytes


@dataclass(frozen=True)
class State:
    """Bytes of a rank that do not depend on its micro batch. On a GPU those in `host` are in none of the
    others.

    weights, masters (fp32 weights that are stepped), optimizer: all the time. gradients: when the update
    begins, the most there are. held: of gradients, while forward and backward run. kept: bytes of an element
    of the gradients that a backward leaves until the update. left: of all of these. bucket: in which
    gradients are reduced, from the first that a backward makes on. reduction: what there is besides weights,
    states and bucket when they are reduced. overlapped: of it, what is there before the backward has ended.
    gathered: parameters of other ranks. update: what the rule needs in a step. start: the model in fp32, as
    every rank builds it. own: gradients in the weights' dtype that no rank of the stage does without.
    """

    weights: int
    masters: int
    optimizer: int
    gradients: int
    held: int = 0
    kept: int = 0
    left: int = 0
    bucket: int = 0
    reduction: int = 0
    overlapped: int = 0
    gathered: int = 0
    update: int = 0
    start: int = 0
    own: int = 0
    host: int = 0

    @property
    def lasting(self) -> int:
        """From step to step, but for gradients."""
        return self.weights + self.masters + self.optimizer


def state_of(config: RunConfig, ranks: int, gpu: bool, model: nn.Module, rule: Rule, groups: Groups) -> State:
    """That of the rank that keeps most. model: its parameters may be on the meta device, in `groups`. gpu:
    what is offloaded is in another memory.
    """
    shares = [_share(config.engine.zero_stage, [p.numel() for p in g["params"]], ranks) for g in groups]
    optimizer, update = _rule_bytes(config, ranks, model, rule, groups, shares)
    size, sizes = DTYPES[config.engine.precision].itemsize, [p.numel() for p in model.parameters()]
    bucket = deepspeed_config.derive(config, 1)["zero_optimization"].get("reduce_bucket_size", BUCKET)
    stage, offload = config.engine.zero_stage, config.engine.offload_optimizer
    if stage == 0:
        state = _unsharded(sum(sizes), size, bucket)
    elif stage == 3:
        state = _sharded(sizes, size, shares, ranks, bucket, offload)
    elif stage == 1 and config.engine.precision == "bf16" and not offload:
        state = _first_stage(sum(sizes), sum(shares), ranks, bucket)
    else:
        whole = max(_within(groups, shares, rank) for rank in range(ranks))
        state = _second_stage(sizes, size, shares, ranks, bucket, stage, whole)
    own = size * (sum(sizes) if stage < 2 else sum(shares))
    state = replace(state, optimizer=optimizer, update=update, start=sum(sizes) * FULL, own=own)
    return _offloaded(state, stage, size, sum(shares), max(sizes), gpu) if offload else state


def _unsharded(total: int, size: int, bucket: int) -> State:
    """DeepSpeed's FP16_UnfusedOptimizer; in fp32 none of its own."""
    masters = total * FULL if size == HALF else 0
    raw = total * size
    return State(
        total * size,
        masters,
        optimizer=0,
        gradients=raw + masters,
        kept=size,
        left=raw,
        reduction=raw + min(total, bucket) * size,
    )


def _first_stage(total: int, share: int, ranks: int, bucket: int) -> State:
    """DeepSpeed's BF16_Optimizer."""
    held, raw = share * ranks * FULL, total * HALF
    return State(
        share * ranks * HALF,
        share * FULL,
        optimizer=0,
        gradients=held + raw,
        held=held,
        kept=HALF,
        left=raw,
        reduction=held + raw + min(total, bucket) * (FULL + HALF),
    )


def _second_stage(
    sizes: Sequence[int],
    size: int,
    shares: Sequence[int],
    ranks: int,
    bucket: int,
    stage: int,
    whole: int,
) -> State:
    """DeepSpeedZeroOptimizer, which is that of the first stage in fp32 and fp16 too. whole: elements of the
    parameters in which a rank's share lies."""
    share, total = sum(shares), sum(sizes)
    copied = min(total, bucket) * size
    state = State(share * ranks * size, share * FULL, optimizer=0, gradients=share * FULL)
    if size == FULL:
        state = replace(state, gradients=(whole + max(shares)) * FULL)
    if stage == 1:
        left = total * FULL
        reduction = max(left, whole * FULL, copied) if total <= bucket else left + copied
        return replace(state, kept=FULL, left=left, bucket=bucket * FULL, reduction=reduction)
    own = share * FULL if size == HALF else 0
    reduction = own + copied if size == HALF else max(copied, whole * FULL)
    overlapped = own + copied if total > bucket else 0
    return replace(state, left=own, bucket=bucket * size, reduction=reduction, overlapped=overlapped)


def _sharded(
    sizes: Sequence[int], size: int, shares: Sequence[int], ranks: int, bucket: int, offload: bool
) -> State:
    """DeepSpeedZeroOptimizer_Stage3."""
    share, total = sum(shares), sum(sizes)
    persistent = sum(one for one in sizes if one <= PERSISTENT) * size
    copied = min(total, bucket) * size
    if size == HALF:  # and in fp32, of those that stay here
        copied += min(share, bucket // ranks) * FULL
    return State(
        share * size,
        share * FULL,
        optimizer=0,
        gradients=(share + (share if offload else max(shares))) * FULL,
        held=share * FULL,
        bucket=bucket * size,
        reduction=share * FULL + copied,
        overlapped=copied if total > bucket else 0,
        gathered=max(persistent, min(total, MOST_GATHERED) * size) if ranks > 1 else 0,
    )


def _offloaded(state: State, stage: int, size: int, share: int, largest: int, gpu: bool) -> State:
    """Where fp32 weights and the rule's state, and what they are stepped by, are in the host's memory.

    In the first two stages these are fp32 gradients, a copy of the weights' share, and one of a gradient.
    """
    stepped = share * (FULL + size) + largest * size if stage < 3 else state.gradients
    device = state.gradients if stage == 2 and size == HALF else 0
    device += largest * size if stage < 3 else 0
    state = replace(state, reduction=state.reduction + (largest * size if stage < 3 else 0))
    if not gpu:  # it is the same memory
        besides = stepped if stage < 3 else 0
        reduction = state.reduction + besides
        return replace(state, gradients=stepped + device, held=state.held + besides, reduction=reduction)
    host = state.masters + state.optimizer + stepped
    left = {"held": 0, "reduction": state.reduction - state.held} if stage == 3 else {}
    return replace(state, masters=0, optimizer=0, gradients=device, update=0, host=host, **left)


def _share(stage: int, sizes: Sequence[int], ranks: int) -> int:
    """Elements of a group that a rank steps."""
    if stage == 0:
        return sum(sizes)
    if stage == 3:
        return sum(-(-size // ranks) for size in sizes)
    return -(-sum(sizes) // (ALIGNMENT * ranks)) * ALIGNMENT


def _within(groups: Iterable[dict[str, Any]], shares: Iterable[int], rank: int) -> int:
    """Elements of the parameters that a rank's shares lie in."""
    found = 0
    for group, share in zip(groups, shares, strict=True):
        begin, place = rank * share, 0
        for parameter in group["params"]:
            end = place + parameter.numel()
            found += parameter.numel() if place < begin + share and begin < end else 0
            place = end
    return found


def _rule_bytes(
    config: RunConfig,
    ranks: int,
    model: nn.Module,
    rule: Rule,
    groups: Groups,
    shares: Sequence[int],
) -> tuple[int, int]:
    """What a rule keeps on the rank that keeps most, and the most that a step takes besides."""
    stage, sharded = config.engine.zero_stage, []
    for group, share in zip(groups, shares, strict=True):
        whole = [_shape(p) for p in group["params"]]
        sharded.append({**group, "params": [(share,)] if stage else whole})
    elementwise = [group for group in sharded if not group.get("whole")]
    kept, most = _stepped(lambda own: rule(own, False), elementwise)
    every, update = sum(kept), most
    whole_groups = [group for group in groups if group.get("whole")]
    if whole_groups:
        names = {id(p): name for name, p in model.named_parameters()}
        shapes = [{**group, "params": [_shape(p) for p in group["params"]]} for group in whole_groups]
        kept, most = _stepped(rule.whole, shapes)
        own = [names[id(p)] for group in whole_groups for p in group["params"]]
        sizes = {name: model.get_parameter(name).numel() for name in own}
        owner = owners(sizes, ranks)
        by_rank = [
            sum(k for k, name in zip(kept, own, strict=True) if owner[name] == r) for r in range(ranks)
        ]
        every += max(by_rank)
        update = max(update, most + _brought(whole_groups, names, sizes, owner, ranks, stage))
    return every, update


def _brought(
    groups: Groups,
    names: dict[int, str],
    sizes: dict[str, int],
    owner: dict[str, int],
    ranks: int,
    stage: int,
) -> int:
    """Weights and gradients of whole parameters at their owners (train.whole), and on their way there."""
    most = 0
    for group in groups:
        held = [0] * ranks
        for parameter in group["params"]:
            name = names[id(parameter)]
            held[owner[name]] += sizes[name]
        first, second = (sorted(held, reverse=True) + [0])[:2]
        most = max(most, 2 * FULL * (first + (second if stage else 0)))
    return most


def _stepped(build: Callable[[Groups], torch.optim.Optimizer], groups: Groups) -> tuple[list[int], int]:
    """A library's optimizer after a step: bytes that it keeps by parameter, and the most that the next step
    takes besides. groups: with shapes in the place of parameters."""
    if not groups:
        return [], 0
    with FakeTensorMode():
        for group in groups:
            group["params"] = [nn.Parameter(torch.empty(shape)) for shape in group["params"]]
        parameters = [parameter for group in groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer, tracker = build(groups), Tracker()
        tracker.leave_out([parameters, [p.grad for p in parameters]])
        with tracker:
            optimizer.step()
            before = tracker.most = tracker.live
            optimizer.step()
    kept = [_bytes(optimizer.state.get(parameter, {})) for parameter in parameters]
    return kept, tracker.most - before


def _bytes(state: Any) -> int:
    return sum(x.untyped_storage().nbytes() for x in tree_leaves(state) if isinstance(x, Tensor))


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)
