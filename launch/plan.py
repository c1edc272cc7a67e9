"""What would a run take? Memory, speed, time and cost of a config, without running it.

    python -m launch.plan experiment=gpt2-1.5b plan.hardware=a100-80gb plan.ranks=8 plan.price=1.8
    python -m launch.plan experiment=llama-7b plan.hardware=h100 plan.ranks=16 plan.json=plan.json
    python -m launch.plan experiment=demo                     # on this machine, whose peak is measured

All keys of `python -m train` are there; those of the plan are in conf/plan.yaml. Memory follows from shapes
(launch.memory; `python -m launch.bench_memory` says how near it comes on a CPU), as of uncompiled blocks, and
of sequences whose documents see each other. It has not been compared with a GPU. The speed is an assumption:
a share of the peak, and links that are used fully, by ZeRO-3 while it computes, by the others after it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data.cli import instantiate, main_guard, one_line_errors
from data.files import write
from data.tokenizer import TokenizerRecipe, vocabulary_size
from launch.memory import Memory, Planned
from launch.overrides import split
from launch.plan_hardware import Hardware, hardware, sent
from launch.report_page import duration, si
from launch.request import CONF
from model.flops import count
from train.config import RunConfig, check_world, from_hydra, micro_batch, steps, total_steps

RECOMPUTED = Fraction(4, 3)  # of the FLOP of a step with activation checkpointing: another forward
FITS, ELSEWHERE, IMPOSSIBLE = "fits", "does not fit this engine", "impossible"


@dataclass(frozen=True)
class Keys:
    """The keys of `plan` in conf/plan.yaml."""

    hardware: str
    ranks: int | None
    memory: float | None
    reserve: float
    peak: float | None
    share: float
    link: float | None
    network: float | None
    price: float | None
    vocabulary: int | None
    dataset_tokens: float | None
    json: str | None

    def __post_init__(self) -> None:
        for key in ("ranks", "memory", "peak", "link", "network", "vocabulary", "dataset_tokens"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"plan.{key}: {value} is not a positive number; give one")
        for key in ("reserve", "price"):
            if (value := getattr(self, key)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"plan.{key}: {value} is negative, or no number; give 0 or more")
        if not 0 < self.share <= 1:
            raise ValueError(f"plan.share: {self.share} is not above 0 and at most 1; give a share")


@dataclass(frozen=True)
class Own:
    """What of conf/plan.yaml is not a run's."""

    plan: Keys


def planned(node: DictConfig) -> dict[str, Any]:
    """All figures of a composed conf/plan.yaml, in bytes, seconds and tokens, as written to plan.json.

    Raises:
        ValueError: one line on what is wrong with a key, or missing.
    """
    own, run_node = split(node, Own)
    keys, config = own.plan, from_hydra(run_node)
    ranks = keys.ranks or config.engine.ranks or 1
    check_world(config, ranks)
    device = _device(keys, config)
    reserve = 0.0 if device.cpu else keys.reserve
    usable = (device.memory / ranks if device.cpu else device.memory) - reserve
    if usable <= 0:
        raise ValueError(f"plan.reserve: {reserve:g} bytes leave nothing of {device.memory:g}; set less")
    memory = Planned(config, ranks, _vocabulary(keys, config), gpu=not device.cpu)
    pace = _pace(keys, config, memory, device)
    size = micro_batch(config, ranks)
    found = memory.at(size)
    largest = memory.largest(usable)
    return {
        "ranks": ranks,
        "hardware": asdict(device),
        "parameters": sum(parameter.numel() for parameter in memory.model.parameters()),
        "micro_batch": size,
        "memory": asdict(found),
        "usable": usable,
        "verdict": verdict(found, usable),
        "largest_micro_batch": largest,
        "largest_dividing_micro_batch": _dividing(config, ranks, largest),
        "assumed": {"share_of_peak": keys.share, "reserve": reserve},
        **pace,
    }


def verdict(memory: Memory, usable: float) -> str:
    """What so many bytes of a device are for a run. Impossible is only what no ZeRO of its stage could do."""
    if memory.peak <= usable:
        return FITS
    return ELSEWHERE if memory.least <= usable else IMPOSSIBLE


def _device(keys: Keys, config: RunConfig) -> Hardware:
    device = hardware(keys.hardware, config.engine.precision)
    precision = config.engine.precision
    peak = keys.peak or device.peak.get(precision)
    if peak is None:
        raise ValueError(
            f"plan.peak: nothing is known of {device.name} in {precision}; set it in FLOP/s, or choose"
            " another engine.precision"
        )
    measured = device.measured and keys.peak is None
    given = {key: value for key in ("memory", "link", "network") if (value := getattr(keys, key)) is not None}
    return replace(device, peak={precision: peak}, measured=measured, **given)


def _vocabulary(keys: Keys, config: RunConfig) -> int:
    """Tokens of the tokenizer; no data is prepared for it."""
    recipe: TokenizerRecipe = instantiate(config.tokenizer, "tokenizer")
    found = keys.vocabulary or config.model.get("vocabulary_size") or getattr(recipe, "vocabulary_size", None)
    if found is None and config.tokenizer["_target_"].endswith((".Bytes", ".Existing")):
        found = vocabulary_size(recipe.train([]))
    if found is None:
        raise ValueError(
            "plan.vocabulary: how many tokens this tokenizer has shows when it is trained; give a number"
        )
    return found


def _dividing(config: RunConfig, ranks: int, largest: int) -> int:
    """The largest micro batch, up to one, into which every step can be dealt; 0: none."""
    most = steps(config).micro_batch(ranks)
    return max((size for size in range(1, min(largest, most) + 1) if most % size == 0), default=0)


def _pace(keys: Keys, config: RunConfig, memory: Planned, device: Hardware) -> dict[str, Any]:
    """Tokens, steps, seconds and cost of the horizon, and of what a step's seconds are made."""
    total, by_length = _horizon(keys, config)
    objective = instantiate(config.objective, "objective")
    model, ranks = memory.model, memory.ranks
    share = objective.predicted_share
    flops = 0.0
    for length, tokens in by_length.items():
        counts = count(model, length, share)  # type: ignore[arg-type]
        flops += tokens * counts.training_flops_per_token
    done = flops * float(RECOMPUTED) if config.engine.activation_checkpointing else flops
    peak = device.peak[config.engine.precision]
    assert peak is not None
    computing = done / (peak * keys.share * (1 if device.cpu else ranks))
    traffic = sent(memory)
    link = _link(device, ranks)
    sending = total * sum(traffic.values()) / link if link else 0.0
    overlaps = config.engine.zero_stage == 3
    seconds = max(computing, sending) if overlaps else computing + sending
    tokens = sum(by_length.values())
    price = keys.price
    return {
        "steps": total,
        "tokens": tokens,
        "flops": flops,
        "sent_per_step": traffic,
        "link": link,
        "step_seconds": {"computing": computing / total, "sending": sending / total, "all": seconds / total},
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "device_hours": seconds * ranks / 3600,
        "cost": None if price is None else seconds * ranks / 3600 * price,
    }


def _link(device: Hardware, ranks: int) -> float | None:
    """Bytes/s of the slowest link between the ranks. Raises ValueError where it is not known."""
    if ranks == 1 or device.cpu:
        return None
    key = "link" if ranks <= device.devices else "network"
    speed = device.link if key == "link" else device.network
    if speed is None:
        raise ValueError(
            f"plan.{key}: is not known of {device.name}, of which {ranks} ranks are to share the work; give"
            " the bytes/s that a device sends"
        )
    return speed


def _horizon(keys: Keys, config: RunConfig) -> tuple[int, dict[int, int]]:
    """Steps, and tokens by the length of the sequences that they are in."""
    if config.horizon.epochs is not None and keys.dataset_tokens is None:
        raise ValueError(
            "horizon.epochs: the length of an epoch shows when the data is prepared; set plan.dataset_tokens,"
            " or horizon.epochs=null and horizon.tokens or horizon.steps"
        )
    total = total_steps(config, int((keys.dataset_tokens or 0) // config.sequence_length))
    if total < 1:
        raise ValueError("horizon: is less than a step; give a longer one")
    stages, found = steps(config).stages, dict[int, int]()
    for stage, following in zip_longest(stages, stages[1:]):
        made = max(0, (min(total, following.step) if following else total) - stage.step)
        found[stage.sequence_length] = (
            found.get(stage.sequence_length, 0) + made * stage.global_batch * stage.sequence_length
        )
    return total, found


PARTS = {
    "weights": "weights",
    "masters": "fp32 weights that are stepped",
    "optimizer": "what the rule keeps",
    "gradients": "gradients, before the update",
    "activations": "activations of a micro batch",
    "buffers": "buckets, gathered weights, work space",
}


def shown(result: dict[str, Any]) -> list[Table | str]:
    """What a person is told."""
    memory, device = result["memory"], result["hardware"]
    title = f"memory of each of {result['ranks']} ranks, {result['micro_batch']} sequences a micro batch"
    table = Table(title=title, title_justify="left", box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for part, name in PARTS.items():
        table.add_row(name, f"{memory[part] / 2**30:,.2f} GiB")
    if memory["host"]:
        table.add_row("in the host's memory instead", f"{memory['host'] / 2**30:,.2f} GiB")
    table.add_row(f"most at a time ({memory['phase']})", f"{memory['peak'] / 2**30:,.2f} GiB", style="bold")
    table.add_row(f"usable of {device['name']}", f"{result['usable'] / 2**30:,.2f} GiB")
    told = {
        FITS: "fits",
        ELSEWHERE: f"does not fit, for buckets and copies of this engine; {memory['least'] / 2**30:,.2f} GiB"
        " are needed without them",
        IMPOSSIBLE: f"impossible: {memory['least'] / 2**30:,.2f} GiB are needed without any buffers",
    }
    (peak,) = device["peak"].values()
    source = "measured" if device["measured"] else "datasheet, or given"
    of_step, cost = result["step_seconds"], result["cost"]
    when = "" if result["verdict"] == FITS else "with enough memory, "
    lines = (
        f"{result['parameters']:,} parameters; {told[result['verdict']]}\n"
        f"largest micro batch: {result['largest_micro_batch']}, that divides the global batch:"
        f" {result['largest_dividing_micro_batch']}\n"
        f"assumed: {result['assumed']['share_of_peak']:.0%} of a peak of {si(peak, 'FLOP/s')} ({source}),"
        f" {result['assumed']['reserve'] / 1e9:g} GB of a device reserved\n"
        f"{when}a step: {of_step['all']:,.3g} s, computing {of_step['computing']:,.3g}, sending"
        f" {of_step['sending']:,.3g} ({sum(result['sent_per_step'].values()) / 1e9:,.3g} GB a rank)\n"
        f"{result['tokens_per_second']:,.0f} tokens/s; {result['steps']:,} steps, {result['tokens']:,}"
        f" tokens: {duration(result['seconds'])}, {result['device_hours']:,.1f} device-hours"
        + ("" if cost is None else f", cost {cost:,.2f}")
    )
    return [table, lines]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="plan")
@one_line_errors
def main(node: DictConfig) -> None:
    file = Path(node.plan.json) if node.plan.json else None
    if file and not file.parent.is_dir():
        raise ValueError(f"plan.json: {file.parent} is not a folder; make it, or name another")
    result = planned(node)
    console = Console(highlight=False)
    for part in shown(result):
        console.print(part, soft_wrap=True)
    if file:
        write(file, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main_guard(main)
