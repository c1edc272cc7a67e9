"""What one micro batch holds in memory at most, found by running the model without any: its operations on
tensors that have a shape but no values, and the bytes of those that live at the same time.

Nothing is known of a family of models here, so that a new one needs no formula.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.cli import instantiate
from data.collate.spans import Spans
from train.config import RunConfig
from train.hardware import DTYPES
from train.objective.base import Objective
from train.start import build_model

ATEN = torch.ops.aten


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until these are gone.

    live: bytes now. most: the most at a time. gradients: bytes of the parameters' gradients, which are not in
    `live`. most_with_gradients: the most of both together; most_backward: from the first gradient on.

    labelled: positions with a label, which are as many as a `nonzero` finds. gpu: has no copies of operands
    whose dtype is not the one that is computed in.
    """

    def __init__(self, labelled: int = 0, gpu: bool = False) -> None:
        super().__init__()
        self.live = self.most = self.gradients = self.most_with_gradients = self.most_backward = 0
        self._labelled, self._gpu = labelled, gpu
        self._held: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def leave_out(self, tensors: Any) -> None:
        """Do not count what was there before."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage(), counted=False)

    def take_gradient(self, parameter: Tensor, kept: int) -> None:
        """A parameter's gradient is no activation any more. kept: bytes of an element until the update."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, reference = self._held[key]
        self._held[key] = (0, reference)
        self.live -= size
        self.gradients += kept * parameter.numel()
        self.most_backward = max(self.most_backward, self.live + self.gradients)
        if not kept:
            parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ATEN._local_scalar_dense.default:  # a value, which there is none of
            return 1.0
        if func is ATEN.nonzero.default:
            found = min(self._labelled, args[0].numel()), args[0].dim()
            result = args[0].new_empty(found, dtype=torch.int64)
        else:
            result = func(*args, **(kwargs or {}))
            if torch.Tag.pointwise in func.tags and not self._gpu:
                self._note(_converted(args))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage(), counted=True)
        return result

    def _hold(self, storage: torch.UntypedStorage, counted: bool) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes() if counted else 0
        self._held[key] = size, weakref.ref(storage, lambda _: self._release(key))
        self.live += size
        self._note()

    def _note(self, besides: int = 0) -> None:
        self.most = max(self.most, self.live + besides)
        both = self.live + self.gradients + besides
        self.most_with_gradients = max(self.most_with_gradients, both)
        if self.most_backward:
            self.most_backward = max(self.most_backward, both)

    def _release(self, key: int) -> None:
        self.live -= self._held.pop(key)[0]


def _converted(operands: Any) -> int:
    """Bytes of the copies that a CPU makes of operands of another dtype than the one it computes in."""
    tensors = [one for one in operands if isinstance(one, Tensor) and one.dim()]
    if len({tensor.dtype for tensor in tensors}) < 2:
        return 0
    common = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return sum(tensor.numel() * common.itemsize for tensor in tensors if tensor.dtype != common)


class _Kernel(torch.autograd.Function):
    """Stands for a kernel of one output that keeps some tensors for its backward."""

    @staticmethod
    def forward(ctx: Any, shape: Any, kept: tuple[Any, ...], keeps: bool, *inputs: Tensor | None) -> Tensor:
        out = inputs[0].new_empty(shape)  # type: ignore[union-attr]
        others = [out.new_empty(size, dtype=dtype) for size, dtype in kept]
        ctx.save_for_backward(*(inputs if keeps else ()), *((out,) if keeps else ()), *others)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        _ = ctx.saved_tensors
        wanted = zip(ctx.like, ctx.needs_input_grad[3:], strict=True)
        made = (d_out.new_empty(x[0], dtype=x[1]) if x and needed else None for x, needed in wanted)
        return (None, None, None, *made)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
    """Keeps one number per query and no scores (arXiv 2205.14135, section 3.1)."""
    sums = query.shape[:-1], torch.float32
    shape = *query.shape[:-1], value.shape[-1]
    return _Kernel.apply(shape, (sums,), True, query, key, value, attn_mask)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _Kernel.apply(x.shape, (((*x.shape[:-1], 1), torch.float32),), True, x, weight)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keeps a byte per element."""
    return _Kernel.apply(x.shape, ((x.shape, torch.bool),), False, x) if p and training else x


# What a GPU has one kernel for, and tensors without a device have not.
GPU_KERNELS = {"scaled_dot_product_attention": _attention, "rms_norm": _rms_norm, "dropout": _dropout}


@dataclass(frozen=True)
class Pass:
    """Bytes of one micro batch.

    activations: the most that forward and backward hold at a time, but for the gradients of parameters.
    with_gradients: the most of both together; backward: the same from the first gradient on.
    """

    activations: int
    with_gradients: int
    backward: int


def make_batch(objective: Objective, model: Any, size: int, length: int) -> dict[str, Tensor]:
    """A micro batch as the objective's collator makes them, of zeros: `size` sequences of `length`.

    What it adds for documents that are kept apart is left out.
    """
    tokens = torch.zeros(size, length, dtype=torch.int64)
    if model.family != "encoder-decoder":
        batch = {"tokens": tokens, "labels": torch.zeros_like(tokens)}
        if getattr(objective, "pairs", None):
            batch |= {"segments": torch.zeros_like(tokens), "pairs": tokens.new_zeros(size)}
        return batch
    targets = torch.zeros(size, objective.target_length(length), dtype=torch.int64)  # type: ignore[attr-defined]
    batch = {"inputs": tokens, "decoder": targets, "labels": torch.zeros_like(targets)}
    parts = objective.parts  # type: ignore[attr-defined]
    if len(parts) > 1 or not isinstance(parts[0].denoiser, Spans):  # then inputs are padded
        batch["documents"] = torch.zeros(size, length, dtype=torch.int32)
    return batch


def labelled(objective: Objective, batch: dict[str, Tensor]) -> int:
    """How many positions of such a micro batch have a label."""
    size, length = batch["labels"].shape
    share = 1.0 if "decoder" in batch else objective.predicted_share
    return size * max(1, round(share * length))


def one_pass(config: RunConfig, size: int, vocabulary_size: int, gpu: bool, kept: int) -> Pass:
    """Of a micro batch of `size` sequences, on a GPU or a CPU.

    kept: bytes of an element of the gradients that the backward leaves until the update.
    """
    with _no_memory(gpu):
        model, objective = build_model(config, vocabulary_size), instantiate(config.objective, "objective")
        model.train()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[config.engine.precision])
        model.activation_checkpointing = config.engine.activation_checkpointing  # type: ignore[assignment]
        batch = make_batch(objective, model, size, config.sequence_length)
        tracker = Tracker(labelled(objective, batch), gpu)
        tracker.leave_out([list(model.parameters()), list(model.buffers()), batch])
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: tracker.take_gradient(parameter, kept)
            )
        with tracker:
            loss, _, _ = objective(model, batch)
            loss.backward()
    return Pass(tracker.most, tracker.most_with_gradients, tracker.most_backward)


@contextlib.contextmanager
def _no_memory(gpu: bool) -> Iterator[None]:
    """Tensors have no values in this block, and the operations are those of a GPU or a CPU."""
    with contextlib.ExitStack() as stack:
        if gpu:
            stack.enter_context(torch.device("meta"))
            for name, kernel in GPU_KERNELS.items():
                stack.enter_context(mock.patch.object(F, name, kernel))
        else:
            stack.enter_context(FakeTensorMode())
        yield
