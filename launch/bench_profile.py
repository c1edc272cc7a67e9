"""Where the time of an engine's step goes, read off torch.profiler.

Every moment of a step belongs to the innermost recorded operation that runs on the step's own thread, and so
exactly one category has it. Going outwards from an operation, the first of these that is met decides:

communication  c10d and gloo operations. One rank waits for nobody, so this is only what calling them costs.
matrices       `aten::linear`: the products with weights, in the attention layer too.
attention      the forward of `model.attention.Attention`: scores, softmax, weighted values, masks and copies.
loss           the forward of `model.heads.LMHead`: head and cross-entropy, whose gradients it computes too.
optimizer      DeepSpeed's `step`: gradient norm, clipping, AdamW, and the weights cast back to bf16.
data           the wait for the loader.
backward       an autograd node has the category of the forward operation that made it, which carries the same
               sequence number.
other          the rest: norms, activations, residual sums, embeddings, gradients copied, Python in between.

Operations of other threads (the loader's) run beside the step and are not counted. The threads of an
operation work together, so that its time on the step's thread is wall-clock time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from data.loader import Loader
from launch.bench_training import EngineLoop
from model.attention import Attention
from model.heads import LMHead

CATEGORIES = ("attention", "matrices", "loss", "optimizer", "communication", "data", "other")
STEP = "bench: step"
MODULES: dict[type[nn.Module], str] = {Attention: "attention", LMHead: "loss"}
PREFIX = "bench: in "  # of the ranges that name a category
BACKWARD = "autograd::engine::evaluate_function: "


def profile_steps(loop: EngineLoop, loader: Loader, first: int, steps: int) -> dict[str, float]:
    """Share of the step time by category over some steps, adding up to 1."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, _ranges(loop):
        for step in range(first, first + steps):
            with record_function(STEP):
                with record_function(PREFIX + "data"):
                    batches = loader.step(step)
                loop.train_step(step, batches)
    return shares(profiler.events() or [])


def waiting_share(loop: EngineLoop, loader: Loader, first: int, steps: int) -> float:
    """Share of the wall-clock of some steps that the loader kept the engine waiting, without a profiler."""
    loop.train_step(first, loader.step(first))  # the loader gets ahead
    start, waited = time.perf_counter(), loader.waited_s
    for step in range(first + 1, first + 1 + steps):
        loop.train_step(step, loader.step(step))
    return (loader.waited_s - waited) / (time.perf_counter() - start)


def shares(events: Iterable[Any]) -> dict[str, float]:
    """Share of the time within STEP ranges by category, from the events of a profile."""
    inside = [(event, chain) for event in events if (chain := _chain(event))[-1].name == STEP]
    forward = {
        event.sequence_nr: _category(chain, {})  # of several with one number the last made the node
        for event, chain in sorted(inside, key=lambda pair: pair[0].time_range.start)
        if event.sequence_nr >= 0 and not any(BACKWARD in outer.name for outer in chain)
    }
    spent = dict.fromkeys(CATEGORIES, 0.0)
    for event, chain in inside:
        spent[_category(chain, forward)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {category: time / total for category, time in spent.items()}


def _chain(event: Any) -> list[Any]:
    """The event and all that it runs within, innermost first."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    return chain


def _category(chain: list[Any], forward: dict[int, str]) -> str:
    """Of a chain's innermost event. forward: the category by sequence number of what autograd undoes."""
    for event in chain:
        if event.name.startswith(("c10d::", "gloo:")):
            return "communication"
        if event.name == "aten::linear":
            return "matrices"
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(BACKWARD):
            return forward.get(event.sequence_nr, "other")
    return "other"


@contextmanager
def _ranges(loop: EngineLoop) -> Iterator[None]:
    """Record the forwards of MODULES, and DeepSpeed's step, as ranges that name their category."""
    deepspeed_engine = loop.engine.engine
    step = deepspeed_engine.step

    def recorded_step() -> None:
        with record_function(PREFIX + "optimizer"):
            step()

    with ExitStack() as undo:
        for module in loop.engine.model.modules():
            if type(module) in MODULES:
                for hook in _record(module, PREFIX + MODULES[type(module)]):
                    undo.callback(hook.remove)
        deepspeed_engine.step = recorded_step
        undo.callback(delattr, deepspeed_engine, "step")
        yield


def _record(module: nn.Module, name: str) -> list[Any]:
    """Hooks that make every forward of a module a range."""
    ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
