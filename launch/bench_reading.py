"""Measure how fast samples are read from prepared shards, here and over a slow line.

    python -m launch.bench_reading [--rounds 5] [--seconds 2] [--others PYTHON] [--json FILE]

Random samples of 1,024 tokens a second, one process on one core: Chunks.sample, the whole Loader (order,
samples, collator), and in turn with them the StreamingDatasets of mosaicml-streaming and litdata on the same
tokens. PYTHON is an interpreter that has those two; make one with
    python -m venv others && others/bin/pip install torch==2.13.0 mosaicml-streaming litdata
Then the time to the first batch, and how long steps wait for shards that come at LINE bytes a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from omegaconf import OmegaConf

from data.cli import main_guard
from data.collate.causal import Causal
from data.loader import Loader
from data.order import Order
from data.packing import Chunks
from data.remote import fetch
from data.shards import HEADER, MANIFEST, SplitWriter, TokenStream

OTHERS = {"streaming": "mosaicml-streaming", "litdata": "litdata"}
LENGTH, BATCH, MICRO_BATCH = 1024, 512, 64
TOKENS, VOCABULARY, DOCUMENT = 2**25, 50_000, 1000  # of these many tokens in the mean
SHARD = 2**21
JUMP = 100_000  # steps
MANY = 10_000  # shards
LINE = 20e6  # bytes a second
STEP, REMOTE_STEPS, BLOCK = 0.2, 100, 2 * SHARD // LENGTH
CACHED = 8  # of 16 shards


def write_folder(folder: Path, tokens: int, shard: int) -> None:
    """A prepared folder of random tokens, without a tokenizer's vocabulary."""
    (folder / "tokenizer").mkdir(parents=True)
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        (folder / "tokenizer" / name).write_text("{}")
    random = np.random.default_rng(0)
    writer = SplitWriter(folder, "train", np.dtype(np.uint16), shard)
    while writer.tokens < tokens:
        length = min(1 + int(random.exponential(DOCUMENT)), tokens - writer.tokens)
        writer.append(np.append(random.integers(1, VOCABULARY, length - 1), 0).astype(np.uint16))
        writer.end_document(length)
    empty = hashlib.sha256(b"{}").hexdigest()
    manifest = {
        "vocabulary_size": VOCABULARY,
        "end_of_text": 0,
        "tokenizer": dict.fromkeys(names, empty),
        "splits": {"train": writer.close()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def make_loader(folder: Path, block: int | None = None) -> Loader:
    """As a run makes it, from nothing."""
    packing = Chunks(TokenStream(folder, "train"), LENGTH, rest=False)
    order = Order(packing.samples, BATCH, 0, block)
    return Loader(packing, order, Causal(LENGTH, 0), micro_batch=MICRO_BATCH, rank=0, world_size=1)


def read_rate(stream: TokenStream, seconds: float) -> float:
    """Random stretches of bare tokens a second, copied."""
    starts = np.random.default_rng(0).integers(0, stream.tokens - LENGTH, 10**6).tolist()
    started = time.perf_counter()
    for done, start in enumerate(starts, start=1):  # noqa: B007
        stream.read(start, start + LENGTH).copy()
        if time.perf_counter() - started > seconds:
            break
    return done / (time.perf_counter() - started)


def sample_rate(packing: Chunks, seconds: float) -> float:
    """Random samples a second."""
    indices = np.random.default_rng(0).integers(0, packing.samples, 10**6).tolist()
    started = time.perf_counter()
    for done, index in enumerate(indices, start=1):  # noqa: B007
        packing.sample(index)
        if time.perf_counter() - started > seconds:
            break
    return done / (time.perf_counter() - started)


def loader_rate(folder: Path, seconds: float) -> float:
    """Samples a second in batches of the whole Loader."""
    loader = make_loader(folder)
    loader.step(0)
    started = time.perf_counter()
    for step in count(1):
        loader.step(step)
        if time.perf_counter() - started > seconds:
            break
    taken = time.perf_counter() - started
    loader.close()
    return step * BATCH / taken


class Other:
    """A library in its own process, on the same core."""

    def __init__(self, library: str, python: str, tokens: Path, folder: Path) -> None:
        script = Path(__file__).with_name("bench_reading_others.py")
        # -P: the modules of launch/ stay out of the way of packages of their names
        self._process = subprocess.Popen(
            [python, "-P", str(script), library, str(tokens), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder.parent / f"{library}.log").open("w"),
            text=True,
        )
        if self._answer() != "ready":
            install = f"pip install torch==2.13.0 {' '.join(OTHERS.values())}"
            raise ValueError(f"--others: {python} cannot read with {OTHERS[library]}; {install}")

    def rate(self, seconds: float) -> float:
        print(seconds, file=self._stream(self._process.stdin), flush=True)
        return float(self._answer())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        lines = (line.strip() for line in self._stream(self._process.stdout))
        return next((line for line in lines if line == "ready" or line.replace(".", "", 1).isdigit()), "")

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def rates(folder: Path, work: Path, python: str | None, rounds: int, seconds: float) -> dict[str, float]:
    """Samples a second of each way to read, the median of rounds in turn, all on one core."""
    stream = TokenStream(folder, "train")
    packing = Chunks(stream, LENGTH, rest=False)
    ways: dict[str, Callable[[float], float]] = {
        "TokenStream.read": partial(read_rate, stream),
        "Chunks.sample": partial(sample_rate, packing),
        "Loader": partial(loader_rate, folder),
    }
    others: list[Other] = []
    try:
        if python:
            tokens = work / "tokens.npy"
            np.save(tokens, stream.read(0, stream.tokens))
            for library in OTHERS:
                others.append(Other(library, python, tokens, work / library))
                ways[library] = others[-1].rate
        found = [{name: way(seconds) for name, way in ways.items()} for _ in range(rounds)]
    finally:
        for other in others:
            other.close()
    return {name: median(one[name] for one in found) for name in ways}


def first_batch_seconds(folder: Path, step: int, rounds: int) -> float:
    """From nothing to the batches of a step, the median."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        loader = make_loader(folder)
        loader.step(step)
        taken.append(time.perf_counter() - started)
        loader.close()
    return median(taken)


def construct_seconds(work: Path, rounds: int) -> float:
    """A TokenStream of MANY shards."""
    write_folder(work / "many", MANY * LENGTH, LENGTH)
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        TokenStream(work / "many", "train")
        taken.append(time.perf_counter() - started)
    return median(taken)


def remote_waits(folder: Path, work: Path) -> dict[str, float]:
    """Training steps of STEP seconds on shards that come at LINE bytes a second, into a cache of CACHED of
    them. first_s: wait of the first step; share: that the others wait."""
    with _served(folder.parent) as address:
        node = {"name": "remote", "address": f"{address}/{folder.name}", "directory": f"{work}/prepared"}
        cache = {"cache": f"{work}/cache", "cache_bytes": CACHED * (2 * SHARD + HEADER)}
        loader = make_loader(fetch(OmegaConf.create(node | cache)), BLOCK)
        loader.step(0)
        first, started = loader.waited_s, time.perf_counter()
        for step in range(1, REMOTE_STEPS):
            time.sleep(STEP)  # as on an accelerator: this process's core is free
            loader.step(step)
        taken = time.perf_counter() - started
        loader.close()
    read = BATCH * LENGTH * 2 / STEP
    return {"first_s": first, "share": (loader.waited_s - first) / taken, "read_bytes_per_s": read}


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder, in a process of its own, at LINE bytes a second over all."""
    context = get_context("spawn")
    port = context.Queue()
    process = context.Process(target=_serve, args=(folder, port), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get()}"
    finally:
        process.kill()
        process.join()


class _Slow(SimpleHTTPRequestHandler):
    free = 0.0  # when the line is

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while block := source.read(2**16):
            outputfile.write(block)
            _Slow.free = max(_Slow.free, time.monotonic()) + len(block) / LINE
            time.sleep(max(0.0, _Slow.free - time.monotonic()))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


def _serve(folder: Path, port: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Slow, directory=str(folder)))
    port.put(server.server_port)
    server.serve_forever()


def bench(python: str | None, rounds: int, seconds: float) -> dict[str, Any]:
    """All figures."""
    with TemporaryDirectory() as directory:
        work, folder = Path(directory), Path(directory, "served", "random")
        write_folder(folder, TOKENS, SHARD)
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            result: dict[str, Any] = {"samples_per_s": rates(folder, work, python, rounds, seconds)}
        finally:
            os.sched_setaffinity(0, cores)
        result["first_batch_s"] = {s: first_batch_seconds(folder, s, rounds) for s in (0, JUMP)}
        result["construct_s"] = construct_seconds(work, rounds)
        result["remote"] = remote_waits(folder, work)
        return result


def lines(result: dict[str, Any]) -> str:
    """What is shown."""
    found, remote = result["samples_per_s"], result["remote"]
    best = max((found[name] for name in OTHERS if name in found), default=None)
    shown = [f"random samples of {LENGTH:,} tokens a second, on one core"]
    for name, rate in found.items():
        ratio = f"  {rate / best:.2f} of the better library" if best else ""
        shown.append(f"  {OTHERS.get(name, name):20}{rate:12,.0f}{ratio}")
    for step, seconds in result["first_batch_s"].items():
        shown.append(f"first batch at step {step:,}: {seconds * 1e3:,.0f} ms")
    shown.append(f"a stream of {MANY:,} shards: {result['construct_s'] * 1e3:,.0f} ms")
    shown.append(
        f"shards at {LINE / 1e6:.0f} MB/s, {remote['read_bytes_per_s'] / 1e6:.1f} used in steps of {STEP} s:"
        f" {remote['share']:.2%} of the time waited, {remote['first_s']:.2f} s for the first batch"
    )
    return "\n".join(shown)


def main() -> None:
    parser = ArgumentParser(description="How fast samples are read from prepared shards.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way to read, a round")
    parser.add_argument(
        "--others", metavar="PYTHON", help="an interpreter with mosaicml-streaming and litdata"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result = bench(arguments.others, arguments.rounds, arguments.seconds)
    print(lines(result))
    if not arguments.others:
        install = f"pip install torch==2.13.0 {' '.join(OTHERS.values())}"
        print(f"not compared with others: make a venv, {install}, and name its python with --others")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main_guard(main)
