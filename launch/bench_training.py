"""A plain fp32 PyTorch loop against the engine: the same model, weights and batches, step by step in turn.

On a machine that others use as well, only what is measured in turn can be compared: a step of one loop, a
step of the other, and every few steps the matrix-product peak that both are shares of.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F

from data.loader import Batch, Loader, pack
from data.order import Order
from data.shards import TokenStream
from model.flops import count
from model.gpt import GPT
from train.config import EngineConfig, Horizon, RunConfig
from train.engine import Engine, World
from train.hardware import DTYPES, measure_matmul
from train.objective.causal import Causal
from train.optim.adamw import AdamW

PLAIN, ENGINE = "plain", "engine"
PRECISIONS = {PLAIN: "fp32", ENGINE: "bf16"}
# One rank has nothing to shard. Stages 0, 1 and 2 took the same CPU time within 1 % (2.24, 2.23 and
# 2.24 s of one thread of a 2-core machine for a step of `small`); in wall-clock 2 was never ahead of 1.
ZERO_STAGE = 1
PEAK_SIZES = (2048, 4096)
PEAK_READINGS = 10  # over a contest
LAST_STEPS = 10  # that the final loss is the mean of
LEARNING_RATE, WARMUP_STEPS = 1e-3, 20


@dataclass(frozen=True)
class Shape:
    """A model and its batch: `batch` sequences of `sequence_length` tokens a step."""

    name: str
    layers: int
    width: int
    heads: int
    sequence_length: int
    batch: int
    vocabulary_size: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence_length


SMALL = Shape("small", layers=6, width=384, heads=6, sequence_length=256, batch=16, vocabulary_size=4096)
LARGE = Shape("large", layers=6, width=768, heads=12, sequence_length=512, batch=8, vocabulary_size=8192)


def build(shape: Shape) -> GPT:
    """The model, in fp32 with the weights of seed 0: learned positions, LayerNorm, exact GELU, no biases."""
    torch.manual_seed(0)
    return GPT(
        vocabulary_size=shape.vocabulary_size,
        sequence_length=shape.sequence_length,
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        bias=False,
    )


def make_loader(shape: Shape, prepared: Path) -> Loader:
    """Batches of the training split of a prepared folder, for one rank without accumulation."""
    stream = TokenStream(prepared, "train")
    if stream.vocabulary_size > shape.vocabulary_size:
        raise ValueError(
            f"{prepared}: has {stream.vocabulary_size} tokens, the model {shape.vocabulary_size}"
        )
    collate = Causal().collator(prepared, shape.sequence_length, isolate=False)
    packing = pack(stream, "chunk", collate, training=True)
    order = Order(packing.samples, shape.batch, seed=0)
    return Loader(packing, order, collate, micro_batch=shape.batch, rank=0, world_size=1)


def warmup(step: int) -> float:
    """Multiplier of the learning rate. Without it training starts so wildly that no losses compare."""
    return min(1.0, (step + 1) / WARMUP_STEPS)


class PlainLoop:
    """What one writes first: eager, fp32, logits of the whole batch, clipping, AdamW with its defaults."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters())

    def train_step(self, step: int, batches: list[Batch]) -> float:
        """The mean token loss in nats before the step."""
        (batch,) = batches
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup(step)
        logits_BTV = self.model(batch["tokens"])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class EngineLoop:
    """The engine with the settings of the plain loop, in bf16 on one rank with all threads."""

    def __init__(self, shape: Shape, model: GPT, world: World, zero_stage: int = ZERO_STAGE) -> None:
        config = RunConfig(
            sequence_length=shape.sequence_length,
            global_batch=shape.batch,
            horizon=Horizon(steps=1),
            engine=EngineConfig(zero_stage=zero_stage, precision=PRECISIONS[ENGINE]),
        )
        like_torch = AdamW(LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        groups = [{"params": list(model.parameters()), "weight_decay": like_torch.weight_decay}]
        self.engine = Engine(config, model, Causal(), like_torch, groups, world)

    def train_step(self, step: int, batches: list[Batch]) -> float:
        """The mean token loss in nats before the step."""
        self.engine.set_learning_rate(warmup(step))
        result = self.engine.train_step(step, batches)
        return result.loss_sum.item() / result.count


@dataclass
class Timings:
    """What a contest measured. Lists by loop: seconds and loss of each step; FLOP/s of each peak reading."""

    tokens: int  # of a step
    flops_per_token: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {PLAIN: [], ENGINE: []})
    losses: dict[str, list[float]] = field(default_factory=lambda: {PLAIN: [], ENGINE: []})
    peaks: dict[str, list[float]] = field(default_factory=lambda: {PLAIN: [], ENGINE: []})

    def figures(self, loop: str) -> dict[str, float]:
        """Of one loop: seconds of a step, rates of the median step, and shares of the peak of its precision.

        The first step, which allocates, does not count. Median step goes with median peak, best with best.
        """
        seconds, peaks = self.seconds[loop][1:], self.peaks[loop]
        flops = self.tokens * self.flops_per_token
        return {
            "step_s_median": median(seconds),
            "step_s_best": min(seconds),
            "tokens_per_s": self.tokens / median(seconds),
            "flops_per_s": flops / median(seconds),
            "peak_flops_per_s_median": median(peaks),
            "peak_flops_per_s_best": max(peaks),
            "peak_share_median": flops / median(seconds) / median(peaks),
            "peak_share_best": flops / min(seconds) / max(peaks),
        }

    def comparison(self) -> dict[str, float]:
        """How many times as fast the engine is, and the losses at the end in nats per token.

        The median is that of the ratios of neighbouring steps, which others' load hits alike.
        """
        pairs = list(zip(self.seconds[PLAIN], self.seconds[ENGINE], strict=True))[1:]
        plain, engine = (mean(self.losses[loop][-LAST_STEPS:]) for loop in (PLAIN, ENGINE))
        return {
            "speedup_median": median(plain_s / engine_s for plain_s, engine_s in pairs),
            "speedup_best": min(plain_s for plain_s, _ in pairs) / min(engine_s for _, engine_s in pairs),
            "steps": len(pairs) + 1,
            "loss_plain": plain,
            "loss_engine": engine,
            "loss_difference": abs(plain - engine),
        }


def measure_peak(precision: str) -> float:
    """Matrix-product FLOP/s with this process's threads: the best of PEAK_SIZES."""
    return max(measure_matmul(DTYPES[precision], size, repeats=1) for size in PEAK_SIZES)


def contest(
    shape: Shape, prepared: Path, world: World, steps: int, advance: Callable[[], object]
) -> tuple[Timings, EngineLoop]:
    """Train both loops for `steps` steps in turn; their timings, and the engine for further use.

    advance: called after each step of both.
    """
    model = build(shape)
    timings = Timings(shape.tokens, count(model, shape.sequence_length).training_flops_per_token)
    plain, engine = PlainLoop(copy.deepcopy(model)), EngineLoop(shape, model, world)
    loader = make_loader(shape, prepared)
    every = max(1, steps // PEAK_READINGS)
    try:
        for step in range(steps):
            batches = loader.step(step)
            for name, loop in ((PLAIN, plain), (ENGINE, engine)):
                start = time.perf_counter()
                loss = loop.train_step(step, batches)
                timings.seconds[name].append(time.perf_counter() - start)
                timings.losses[name].append(loss)
            if step % every == 0:
                for name, precision in PRECISIONS.items():
                    timings.peaks[name].append(measure_peak(precision))
            advance()
    finally:
        loader.close()
    return timings, engine
