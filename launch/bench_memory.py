"""How near is what launch.plan says to what the engine allocates? Predicted from shapes, measured on the CPU.

    python -m launch.bench_memory [--only WORD …] [--json FILE]

Each of SHAPES takes three steps of the real engine on one rank, on random tokens. Between them nothing is
shared but the config: the prediction runs no engine, and what is measured is

state        the storages of all tensors that are there when an update begins: weights, gradients, fp32
             weights, what the rule keeps. The buckets of ZeRO's communication are left out.
activations  the most that is allocated at a time within forward and backward of the third step, by the
             record of PyTorch's allocator, without parameters' gradients and what DeepSpeed makes of them.
peak         the most that there is at a time in the third step, by the same record. ZeRO-2 and 3 reserve a
             bucket in it (ZeRO-1 too in fp32), of 1 GB in bf16 and 2 in fp32, beside which these models are
             small: mind the shapes without one.

Bytes do not depend on the machine or its load.
"""

from __future__ import annotations

import gc
import json
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from data.cli import instantiate, main_guard
from data.files import write
from data.loader import IGNORED
from launch.memory import Planned
from launch.memory_pass import labelled, make_batch
from launch.memory_state import BUCKET
from launch.overrides import composing
from train.config import RunConfig, accumulation, from_hydra
from train.engine import Engine, World, start_world, stop_world
from train.objective.base import Objective
from train.optim.groups import parameter_groups
from train.start import build_model, scales

VOCABULARY = 2048
WIDTH = 120  # columns, of which the table needs some 110
SETTLED = 0.3  # seconds in which the threads of a communication let go of what they sent
STEPS = 3  # the rule's state is there from the second on
GRADIENT, END, BEGIN = "gradient ", "end of gradient", "begin"  # marks in the record

GPT = ("model=gpt-mini", "sequence_length=128", "micro_batch=4", "global_batch=4")
BERT = ("experiment=bert-tiny", "micro_batch=4", "global_batch=4")
T5 = ("experiment=t5-tiny", "micro_batch=4", "global_batch=4")
LLAMA = ("experiment=llama-tiny", "packing.isolate=false", "micro_batch=4", "global_batch=4")
FP32, CHECKPOINT = "engine.precision=fp32", "engine.activation_checkpointing=true"

SHAPES: dict[str, tuple[str, ...]] = {
    "gpt": GPT,
    "gpt fp32": (*GPT, FP32),
    "gpt checkpointing": (*GPT, CHECKPOINT),
    "gpt fp32 checkpointing": (*GPT, FP32, CHECKPOINT),
    "gpt wide": (*GPT, "model.width=512", "model.heads=8", "model.layers=2"),
    "gpt deep": (*GPT, "model.width=64", "model.heads=2", "model.layers=12"),
    "gpt long": (*GPT, "sequence_length=1024", "micro_batch=1", "global_batch=1", "model.layers=2"),
    "gpt large batch": (*GPT, "micro_batch=32", "global_batch=32", "model.layers=2"),
    "gpt zero0": (*GPT, "engine=zero0"),
    "gpt zero0 fp32": (*GPT, "engine=zero0", FP32),
    "gpt zero1": (*GPT, "engine=zero1"),
    "gpt zero1 fp32": (*GPT, "engine=zero1", FP32),
    "gpt zero3": (*GPT, "engine=zero3"),
    "gpt zero3 checkpointing": (*GPT, "engine=zero3", CHECKPOINT),
    "gpt accumulating": (*GPT, "micro_batch=2"),
    "gpt offload": (*GPT, "engine.offload_optimizer=true"),
    "gpt dropout": (*GPT, "model.dropout=0.1"),
    "gpt muon": (*GPT, "optim=muon"),
    "gpt adafactor": (*GPT, "optim=adafactor"),
    "gpt soap": (*GPT, "optim=soap"),
    "gpt shampoo zero1": (*GPT, "optim=shampoo", "engine=zero1"),
    "gpt lion zero0": (*GPT, "optim=lion", "engine=zero0"),
    "bert": BERT,
    "bert fp32": (*BERT, FP32),
    "bert checkpointing": (*BERT, CHECKPOINT),
    "bert pairs": (*BERT, "objective=masked-next-sentence", "model.pair_head=true"),
    "t5": T5,
    "t5 fp32": (*T5, FP32),
    "t5 checkpointing": (*T5, CHECKPOINT),
    "t5 zero1 adafactor": (*T5, "engine=zero1", "optim=adafactor"),
    "llama": LLAMA,
    "llama fp32": (*LLAMA, FP32),
    "llama checkpointing zero3": (*LLAMA, CHECKPOINT, "engine=zero3"),
    "llama muon long": (*LLAMA, "optim=muon", "sequence_length=512", "micro_batch=2", "global_batch=2"),
}

PARTS = ("state", "activations", "peak")


@dataclass(frozen=True)
class Bytes:
    """Of one rank: see the module."""

    state: int
    activations: int
    peak: int


def config_of(*overrides: str) -> RunConfig:
    """The config of a run of one rank and one thread."""
    alone = ("engine.ranks=1", "engine.threads=1")
    usual = ("tokenizer=bytes", "horizon={steps:3,tokens:null,epochs:null}", *alone)
    first = [one for one in overrides if one.startswith("experiment=")]
    with composing():
        chosen = compose("config", overrides=[*first, *usual, *(o for o in overrides if o not in first)])
    return from_hydra(chosen)


def predicted(config: RunConfig, ranks: int = 1) -> Bytes:
    """From shapes alone."""
    memory = Planned(config, ranks, VOCABULARY, gpu=False).at(config.micro_batch or config.global_batch)
    state = memory.weights + memory.masters + memory.optimizer + memory.gradients
    return Bytes(state, memory.activations, memory.peak)


def measured(config: RunConfig, world: World) -> Bytes:
    """What the engine holds on this rank, in its last of STEPS steps."""
    gc.collect()
    objective: Objective = instantiate(config.objective, "objective")
    model = build_model(config, VOCABULARY)
    count = accumulation(config, world.size)
    batches = [random_batch(config, objective, model) for _ in range(count)]
    others = _storages()  # as long as they are there, nothing else has their addresses
    for parameter in model.parameters():
        others.pop(parameter.untyped_storage().data_ptr(), None)
    for parameter in model.parameters():  # before those of DeepSpeed
        parameter.register_post_accumulate_grad_hook(_mark_gradient)
    rule = instantiate(config.optim, "optim")
    groups = parameter_groups(model, rule, scales(config, model, VOCABULARY, rule))
    engine = Engine(config, model, _Marking(objective), rule, groups, world)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: _mark(END))
    state = 0

    def at_update(loss: float, norm: float) -> bool:
        nonlocal state
        if world.size > 1:
            time.sleep(SETTLED)
        state = sum(size for size in _sizes(others) if size < 2 * BUCKET)
        return True

    for step in range(STEPS - 1):
        engine.train_step(step, batches, at_update if step == STEPS - 2 else _accepted)
    lasting = sum(_sizes(others))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        engine.train_step(STEPS - 1, batches)
    events = _events(record)
    return Bytes(state, most_activations(events), lasting + most_allocated(events))


def most_allocated(events: list[tuple[str, int, int]]) -> int:
    """The most bytes at a time of what was allocated since the beginning. events: see `most_activations`."""
    held: dict[int, int] = {}
    now = most = 0
    for _, address, size in events:
        if size > 0:
            held[address] = size
            now += size
            most = max(most, now)
        elif size < 0:
            now -= held.pop(address, 0)
    return most


def most_activations(events: list[tuple[str, int, int]]) -> int:
    """The most bytes at a time from each mark BEGIN to the last gradient after it.

    events: in order: (mark, 0, 0), or ("", address, bytes), negative where they are freed.
    """
    held: dict[int, int] = {}  # by address, of what was allocated since BEGIN
    most = now = found = 0
    within = skipped = False
    for name, address, size in events:
        if name == BEGIN:
            held, now, found, within = {}, 0, 0, True
        elif name.startswith(GRADIENT):
            most, skipped = max(most, found), True
            now -= held.pop(int(name.removeprefix(GRADIENT)), 0)
        elif name == END:
            skipped = False
        elif within and size > 0 and not skipped:
            held[address] = size
            now += size
            found = max(found, now)
        elif within and size < 0:
            now -= held.pop(address, 0)
    return most


def random_batch(config: RunConfig, objective: Objective, model: nn.Module) -> dict[str, Tensor]:
    """A micro batch of random tokens, with as many labels as are expected of the objective."""
    size = config.micro_batch or config.global_batch
    batch = make_batch(objective, model, size, config.sequence_length)
    for key in ("tokens", "inputs", "decoder", "labels"):
        if key in batch:
            batch[key].random_(VOCABULARY)
    labels = batch["labels"]
    labels.view(-1)[torch.randperm(labels.numel())[labelled(objective, batch) :]] = IGNORED
    return batch


class _Marking:
    """An objective whose calls are marked in the record."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.count = objective.count

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Any:
        _mark(BEGIN)
        return self._objective(model, batch)


def _mark(name: str) -> None:
    with record_function(name):
        pass


def _mark_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    _mark(f"{GRADIENT}{parameter.grad.untyped_storage().data_ptr()}")


def _accepted(loss: float, norm: float) -> bool:
    return True


def _events(record: profile) -> list[tuple[str, int, int]]:
    """Marks and allocations in the order in which they were."""
    assert record.profiler is not None and record.profiler.kineto_results is not None
    found, waiting = [], list(record.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == _EventType.Allocation:
            found.append((event.start_time_ns, "", event.typed[1].ptr, event.typed[1].alloc_size))
        elif event.name in (BEGIN, END) or event.name.startswith(GRADIENT):
            found.append((event.start_time_ns, event.name, 0, 0))
    return [(name, address, size) for _, name, address, size in sorted(found, key=lambda event: event[0])]


def _storages() -> dict[int, torch.UntypedStorage]:
    """Those of all tensors that Python knows, by their addresses."""
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    found = (one.untyped_storage() for one in tensors if one.device.type == "cpu")
    return {storage.data_ptr(): storage for storage in found}


def _sizes(others: dict[int, torch.UntypedStorage]) -> list[int]:
    """Bytes of the storages that are there besides."""
    return [storage.nbytes() for address, storage in _storages().items() if address not in others]


def error(own: int, real: int) -> float:
    """Of a prediction, relative to what is."""
    return own / real - 1


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each shape: predicted / measured."""
    shown = Table(box=SIMPLE)
    for heading in ("", *(heading for part in PARTS for heading in (f"{part} MB", "error"))):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        cells = []
        for part in PARTS:
            own, real = row["predicted"][part], row["measured"][part]
            cells += [f"{own / 1e6:,.2f} / {real / 1e6:,.2f}", f"{error(own, real):+.2%}"]
        shown.add_row(row["name"], *cells)
    return shown


def main() -> None:
    parser = ArgumentParser(
        prog="python -m launch.bench_memory",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="shapes that are named so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    chosen = [name for name in SHAPES if any(word in name for word in arguments.only)]
    if not chosen:
        raise ValueError(f"--only: no shape is named so; there are {', '.join(SHAPES)}")
    if torch.cuda.is_available():
        raise ValueError("launch.bench_memory: measures the CPU; hide the GPUs with CUDA_VISIBLE_DEVICES=")
    if arguments.json and not arguments.json.parent.is_dir():
        raise ValueError(f"--json: {arguments.json.parent} is not a folder")
    world = start_world()
    rows: list[dict[str, Any]] = []
    console = Console(highlight=False, width=WIDTH)
    for name in track(chosen, "measuring", console=console, transient=True):
        config = config_of(*SHAPES[name])
        own, real = predicted(config), measured(config, world)
        rows.append({"name": name, "predicted": asdict(own), "measured": asdict(real)})
    stop_world()
    console.print(table(rows))
    for part in PARTS:
        most = max(abs(error(row["predicted"][part], row["measured"][part])) for row in rows)
        console.print(f"{part}: within {most:.2%} over {len(rows)} shapes")
    if arguments.json:
        write(arguments.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main_guard(main)
