"""Measure this machine and the engine on it, in one run.

    python -m launch.bench [--only small large data packing memory checkpoint]
                            [--steps 100] [--rounds 12] [--json FILE]

small    6 layers x 384: a plain fp32 loop and the bf16 engine train on the same text in turn, --steps steps
large    6 layers x 768: the same for --rounds steps
data     the order's jump, and preparation beside the bare tokenizer
packing  small at sequences of 256 and 512: --rounds steps with documents kept apart beside plain ones; takes
         minutes, so only where it is asked for
memory   of preparing 20 MB and 200 MB; takes minutes, so only where it is asked for
checkpoint
         --rounds saves, synchronous and asynchronous in turn: how long they stall the loop, and what the
         checksums take, on the disk of runs/; takes minutes, so only where it is asked for

Both shapes measure the matrix-product peak between their steps, and show where the engine's time goes. It is
the CPU that is measured. Other load falls on all alike: read ratios, and mind the load average.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.cli import main_guard
from launch.bench_checkpoint import ASYNCHRONOUS, HASHED, INTERVAL, MODES, RAW, checkpoints
from launch.bench_checkpoint import PLAIN as UNHASHED
from launch.bench_data import MEMORY_BYTES, jump_seconds, memory, preparation, prepare_library
from launch.bench_packing import MEANS, packing
from launch.bench_packing import PRECISIONS as PACKING_PRECISIONS
from launch.bench_packing import SHAPES as PACKING_SHAPES
from launch.bench_profile import profile_steps, waiting_share
from launch.bench_training import (
    ENGINE,
    LARGE,
    PLAIN,
    PRECISIONS,
    SMALL,
    ZERO_STAGE,
    Shape,
    Timings,
    contest,
    make_loader,
)
from train.engine import World, start_world, stop_world
from train.hardware import device_name

SHAPES = {shape.name: shape for shape in (SMALL, LARGE)}
DEFAULT = ("small", "large", "data")
SECTIONS = (*DEFAULT, "packing", "memory", "checkpoint")
PROFILED_STEPS, WAITING_STEPS = 4, 6
PREPARATIONS = 6
RUNS = Path("runs")  # checkpoints are measured on the disk that those of runs lie on


def measure_shape(
    shape: Shape, prepared: Path, world: World, steps: int, progress: Progress
) -> dict[str, Any]:
    """The contest of a shape, then the engine alone: its wait for data and where its time goes."""
    task = progress.add_task(f"{shape.name}: plain and engine in turn", total=steps)
    timings, engine = contest(shape, prepared, world, steps, lambda: progress.advance(task))
    task = progress.add_task(f"{shape.name}: profile", total=None)
    loader = make_loader(shape, prepared)
    try:
        waiting = waiting_share(engine, loader, 0, WAITING_STEPS)
        shares = profile_steps(engine, loader, WAITING_STEPS + 1, PROFILED_STEPS)
    finally:
        loader.close()
    progress.update(task, total=1, completed=1)
    return {**summary(timings), "data_wait_share": waiting, "time_shares": shares}


def summary(timings: Timings) -> dict[str, Any]:
    """All figures of a contest."""
    return {**{loop: timings.figures(loop) for loop in PRECISIONS}, **timings.comparison()}


def measure_data(tokenizer: Path, progress: Progress) -> dict[str, Any]:
    """The figures of the data path."""
    task = progress.add_task("data: tokenizer alone and preparation in turn", total=PREPARATIONS)
    prepared = preparation(tokenizer, PREPARATIONS, lambda: progress.advance(task))
    return {"order_jump_s": jump_seconds(), "preparation": prepared}


def shape_tables(shape: Shape, result: dict[str, Any]) -> list[Table | str]:
    """What is shown of a shape."""
    sizes = f"{shape.layers} layers x {shape.width}, sequence {shape.sequence_length}, batch {shape.batch}"
    speed = Table(
        title=f"{shape.name}: {sizes}, vocabulary {shape.vocabulary_size:,}", title_justify="left", box=SIMPLE
    )
    for heading in ("", "ms/step", "best", "tokens/s", "GFLOP/s", "peak", "share", "(best)"):
        speed.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for loop, precision in PRECISIONS.items():
        figures = result[loop]
        speed.add_row(
            f"{loop} {precision}",
            f"{figures['step_s_median'] * 1e3:,.0f}",
            f"{figures['step_s_best'] * 1e3:,.0f}",
            f"{figures['tokens_per_s']:,.0f}",
            f"{figures['flops_per_s'] / 1e9:,.0f}",
            f"{figures['peak_flops_per_s_median'] / 1e9:,.0f}",
            f"{figures['peak_share_median']:.1%}",
            f"{figures['peak_share_best']:.1%}",
        )
    peaks = {loop: result[loop]["peak_flops_per_s_median"] for loop in PRECISIONS}
    lines = (
        f"engine / plain: {result['speedup_median']:.2f} times as fast"
        f" (best steps {result['speedup_best']:.2f})\n"
        f"bf16 peak / fp32 peak: {peaks[ENGINE] / peaks[PLAIN]:.2f}\n"
        f"loss after {result['steps']} steps: plain {result['loss_plain']:.4f}, engine"
        f" {result['loss_engine']:.4f}, difference {result['loss_difference']:.4f}\n"
        f"waiting for data: {result['data_wait_share']:.3%} of the engine's time"
    )
    goes = Table(title="where the engine's time goes", title_justify="left", box=SIMPLE)
    for category in result["time_shares"]:
        goes.add_column(category, justify="right")
    goes.add_row(*(f"{share:.1%}" for share in result["time_shares"].values()))
    return [speed, lines, goes]


def data_lines(result: dict[str, Any]) -> str:
    """What is shown of the data path."""
    prepared = result["preparation"]
    return (
        f"order: a jump to step 10^9 takes {result['order_jump_s'] * 1e3:.2f} ms\n"
        f"preparation of {prepared['bytes'] / 1e6:.1f} MB, tokenizer given: "
        f"{prepared['prepare_bytes_per_s'] / 1e6:.2f} MB/s, the tokenizer's encode_batch alone "
        f"{prepared['bare_bytes_per_s'] / 1e6:.2f} MB/s: {prepared['relative_median']:.1%} of it"
        f" (best rounds {prepared['relative_best']:.1%})"
    )


def packing_table(results: list[dict[str, Any]]) -> Table:
    """What is shown of packing."""
    title = "packing: step with documents / plain step (best / best), by their mean tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in ("length", "", "plain ms", *MEANS):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        ratios = (f"{result['ratios'][name]:.2f} ({result['ratios_best'][name]:.2f})" for name in MEANS)
        plain = f"{result['plain_s'] * 1e3:,.0f}"
        table.add_row(str(result["sequence_length"]), result["precision"], plain, *ratios)
    return table


def checkpoint_parts(result: dict[str, Any]) -> list[Table | str]:
    """What is shown of checkpoints."""
    size = result["bytes"]
    table = Table(
        title=f"checkpoint: {result['parameters'] / 1e6:.1f} M parameters, {size / 1e6:,.0f} MB, medians of"
        f" {result['saves']} saves; a plain step takes {result['step_s'] * 1e3:,.0f} ms",
        title_justify="left",
        box=SIMPLE,
    )
    every = f"of {INTERVAL:.0f} s"
    for heading in ("", "stall ms", "(best)", "write ms", "steps", "cost ms", every):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for mode in MODES:
        row = result[mode]
        stall = (row[name] for name in ("stall_s", "stall_s_best", "write_s"))
        table.add_row(
            mode,
            *(f"{seconds * 1e3:,.0f}" for seconds in stall),
            "-" if row["slowdown"] is None else f"x {row['slowdown']:.2f}",
            f"{row['cost_s'] * 1e3:,.0f}",
            f"{row['cost_share']:.2%}",
        )
    stalled, reads = result[ASYNCHRONOUS], {k: v * 1e9 for k, v in result["read_s_per_byte"].items()}
    rates = {name: f"{rate / 1e6:,.0f}" for name, rate in result["write_bytes_per_s"].items()}
    lines = (
        f"asynchronous / synchronous: stall {result['stall_relative']:.2f}, cost (stall, and what the steps"
        f" beside lose) {result['cost_relative']:.2f}\n"
        f"an asynchronous stall: to begin {stalled['begin_s'] * 1e3:,.0f} ms, to name it and remove the one"
        f" before {stalled['settle_s'] * 1e3:,.0f} ms\n"
        f"a snapshot: as it stands in memory {result['collect_s'] * 1e3:,.0f} ms, as copies"
        f" {result['snapshot_s'] * 1e3:,.0f} ms\n"
        f"written, flushed: {rates[HASHED]} MB/s, without checksums {rates[UNHASHED]}, raw {rates[RAW]}; time"
        f" with checksums / without {result['hashing_relative']:.2f} (best"
        f" {result['hashing_relative_best']:.2f}), / raw {result['raw_relative']:.2f}\n"
        f"the newest whole one is found: {reads['disk']:.2f} s/GB from disk, {reads['memory']:.2f} from"
        " memory"
    )
    return [table, lines]


def bench(sections: list[str], steps: int, rounds: int, console: Console) -> dict[str, Any]:
    """Measure the sections, printing each when it is done; all figures, as plain numbers in SI units."""
    world = start_world()
    results: dict[str, Any] = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "zero_stage": ZERO_STAGE,
        "load_average_before": os.getloadavg()[0],
    }
    with Progress(console=console) as progress:
        for name, count in (("small", steps), ("large", rounds)):
            if name in sections:
                shape = SHAPES[name]
                prepared = prepare_library(shape.vocabulary_size)
                results[name] = measure_shape(shape, prepared, world, count, progress)
                for part in shape_tables(shape, results[name]):
                    progress.console.print(part)
        if "data" in sections:
            tokenizer = prepare_library(SMALL.vocabulary_size) / "tokenizer" / "tokenizer.json"
            results["data"] = measure_data(tokenizer, progress)
            progress.console.print(data_lines(results["data"]))
        if "packing" in sections:
            total = len(PACKING_SHAPES) * len(PACKING_PRECISIONS) * rounds
            task = progress.add_task("packing: plain and documents in turn", total=total)
            results["packing"] = packing(rounds, lambda: progress.advance(task))
            progress.console.print(packing_table(results["packing"]))
        if "memory" in sections:
            task = progress.add_task("memory of preparation", total=len(MEMORY_BYTES))
            peaks = memory(MEMORY_BYTES, lambda: progress.advance(task))
            results["memory"] = {str(size): peak for size, peak in peaks.items()}
            shown = ", ".join(
                f"{peak / 2**20:,.0f} MiB for {size / 1e6:.0f} MB" for size, peak in peaks.items()
            )
            progress.console.print(f"most memory of preparation: {shown}")
        if "checkpoint" in sections:
            task = progress.add_task("checkpoint: both modes in turn", total=rounds)
            RUNS.mkdir(exist_ok=True)
            results["checkpoint"] = checkpoints(RUNS, world, rounds, lambda: progress.advance(task))
            for part in checkpoint_parts(results["checkpoint"]):
                progress.console.print(part)
    results["load_average_after"] = os.getloadavg()[0]
    console.print(
        f"{results['device']}, {results['threads']} threads, ZeRO-{ZERO_STAGE}; load average"
        f" {results['load_average_before']:.1f} before, {results['load_average_after']:.1f} after"
    )
    stop_world()
    return results


def main() -> None:
    parser = ArgumentParser(
        prog="python -m launch.bench",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(DEFAULT), help="what to measure")
    parser.add_argument("--steps", type=_at_least_two, default=100, help="steps of small (default 100)")
    parser.add_argument(
        "--rounds",
        type=_at_least_two,
        default=12,
        help="steps of large and of packing, saves of checkpoint (default 12)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        raise ValueError("launch.bench: measures the CPU; hide the GPUs with CUDA_VISIBLE_DEVICES=")
    if arguments.json and not arguments.json.parent.is_dir():
        raise ValueError(f"--json: {arguments.json.parent} is not a folder")
    results = bench(arguments.only, arguments.steps, arguments.rounds, Console(highlight=False))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _at_least_two(text: str) -> int:
    """The first step does not count."""
    if int(text) < 2:
        raise ArgumentTypeError(f"{text} is below 2")
    return int(text)


if __name__ == "__main__":
    main_guard(main)
