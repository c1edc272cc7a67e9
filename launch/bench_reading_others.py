"""What launch.bench_reading compares with, run in an interpreter that has it: one library, one process.

Reads nothing of this project. Arguments: a library, a file of tokens (.npy, uint16), a folder to write them
to in the library's format. Then, for each number of seconds that stands in a line on stdin, it goes through
shuffled samples for so long and prints how many it got a second.
"""

from __future__ import annotations

import importlib.machinery
import sys
import time
import types
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 1024
CHUNK = "64MB"
BATCH = 64  # with 1, streaming takes 17 times as long


def streaming(tokens: Path, folder: Path) -> Iterable[Any]:
    """A StreamingDataset of mosaicml-streaming, of samples that are arrays of fixed length."""
    _without_torchvision()
    from streaming import MDSWriter, StreamingDataset

    columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK.lower()) as writer:
        for sample in _samples(tokens):
            writer.write({"tokens": sample})
    return StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)


def litdata(tokens: Path, folder: Path) -> Iterable[Any]:
    """A StreamingDataset of litdata with its TokensLoader."""
    from litdata import StreamingDataset, TokensLoader, optimize

    count = len(np.load(tokens, mmap_mode="r")) // LENGTH
    optimize(
        fn=partial(_stretch, str(tokens)),
        inputs=list(range(0, count, 2**12)),
        output_dir=str(folder),
        chunk_bytes=CHUNK,
        item_loader=TokensLoader(),
        num_workers=1,
        verbose=False,
    )
    return StreamingDataset(str(folder), item_loader=TokensLoader(block_size=LENGTH), shuffle=True)


def _samples(tokens: Path) -> Iterator[np.ndarray]:
    array = np.load(tokens, mmap_mode="r")
    for start in range(0, len(array) - LENGTH + 1, LENGTH):
        yield np.array(array[start : start + LENGTH])


def _stretch(tokens: str, first: int) -> Iterator[Any]:
    """2**12 samples from sample `first` on, as one tensor."""
    import torch

    array = np.load(tokens, mmap_mode="r")[first * LENGTH : (first + 2**12) * LENGTH]
    yield torch.from_numpy(np.array(array))


def _without_torchvision() -> None:
    """Streaming imports it for images, and it does not load beside every build of torch."""
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    for name in (f"torchvision{part}" for part in names):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name].__path__ = []
    sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


def endless(dataset: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from dataset


def main() -> None:
    library, tokens, folder = sys.argv[1:]
    samples = endless({"streaming": streaming, "litdata": litdata}[library](Path(tokens), Path(folder)))
    next(samples)
    print("ready", flush=True)
    for line in sys.stdin:
        count, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < float(line):
            count += sum(1 for _ in islice(samples, 100))
        print(count / seconds, flush=True)


if __name__ == "__main__":
    main()
