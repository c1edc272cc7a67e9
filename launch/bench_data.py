"""What the data path costs: jumps of the order, and preparation beside the bare tokenizer."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer

from data.order import Order
from data.prepare import CONF, prepare
from data.sources import PythonLibrary

JUMP = 10**9  # steps
JUMP_SAMPLES, JUMP_BATCH = 10**8, 512
MEMORY_BYTES = (20 * 10**6, 200 * 10**6)
# Prepares one corpus and prints the most memory that it had in use, in KiB. /proc is asked where there is
# one: what getrusage says of a process includes the parent that it was forked from.
CHILD = """
import resource, sys
from pathlib import Path
from launch.bench_data import choice
from data.prepare import prepare

data = choice("data/text", {"source": {"paths": sys.argv[1]}, "directory": sys.argv[2]})
prepare(data, choice("tokenizer/bpe"), progress=False)
status = Path("/proc/self/status")
if status.exists():
    print(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
"""


def choice(name: str, changes: dict[str, Any] | None = None) -> DictConfig:
    """A file of conf/, such as "data/text", with some keys changed."""
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes or {})
    assert isinstance(node, DictConfig)
    return node


def prepare_library(vocabulary_size: int) -> Path:
    """The prepared folder of the Python library and a BPE tokenizer; made if it is not there yet."""
    return prepare(
        choice("data/python-library"), choice("tokenizer/bpe", {"vocabulary_size": vocabulary_size})
    )


def jump_seconds(repeats: int = 9) -> float:
    """Making an order of 10^8 samples and jumping to its step 10^9 at a global batch of 512; the median."""
    seconds = []
    for seed in range(repeats):
        start = time.perf_counter()
        Order(JUMP_SAMPLES, JUMP_BATCH, seed).step(JUMP)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def preparation(tokenizer: Path, rounds: int, advance: Callable[[], object]) -> dict[str, float]:
    """Preparation of the Python library with an existing tokenizer.json, in turn with `encode_batch` alone.

    Preparation is everything from reading files to the finished folder, held-out text compressed and round
    trips checked. Bytes a second of each; relative: preparation's part of the bare rate, the median over the
    rounds and that of the best of each. advance: called after each round.
    """
    bare, whole = [], []
    for _ in range(rounds):
        bare.append(_alone(_encode_seconds, tokenizer))
        whole.append(_alone(_prepare_seconds, tokenizer))
        advance()
    size = sum(len(text.encode()) for text in _library())
    return {
        "bytes": size,
        "bare_bytes_per_s": size / median(bare),
        "prepare_bytes_per_s": size / median(whole),
        "relative_median": median(b / w for b, w in zip(bare, whole, strict=True)),
        "relative_best": min(bare) / min(whole),
    }


def _alone(function: Callable[[Path], float], tokenizer: Path) -> float:
    """What `function` returns in a process of its own: its seconds then do not depend on the heap that those
    before it left behind, which slowed preparation down by more than half within five rounds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, tokenizer).result()


def _library() -> list[str]:
    """The documents of the Python library."""
    documents: dict[str, list[str]] = {}
    for document in PythonLibrary().documents():
        documents.setdefault(document.id, []).append(document.text)
    return ["".join(pieces) for pieces in documents.values()]


def _encode_seconds(tokenizer: Path) -> float:
    texts, fresh = _library(), Tokenizer.from_file(str(tokenizer))  # it remembers words it has seen
    start = time.perf_counter()
    encodings = fresh.encode_batch(texts)
    seconds = time.perf_counter() - start
    del encodings  # outside of the time
    return seconds


def _prepare_seconds(tokenizer: Path) -> float:
    existing = choice("tokenizer/existing", {"path": str(tokenizer)})
    with TemporaryDirectory() as directory:
        data = choice("data/python-library", {"directory": directory})
        start = time.perf_counter()
        prepare(data, existing, progress=False)
        return time.perf_counter() - start


def memory(sizes: tuple[int, ...], advance: Callable[[], object]) -> dict[int, int]:
    """Most resident memory, in bytes, of preparing corpora of about `sizes` bytes, each in its own process.

    The corpus is one file, the Python library over and over. advance: called after each.
    """
    library = "".join(document.text for document in PythonLibrary().documents()).encode()
    peaks = {}
    for size in sizes:
        with TemporaryDirectory() as directory:
            corpus = Path(directory, "corpus.txt")
            with corpus.open("wb") as file:
                while file.tell() < size:
                    file.write(library)
            command = [sys.executable, "-c", CHILD, str(corpus), directory]
            printed = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=CONF.parent
            ).stdout
        peaks[size] = int(printed) * 1024
        advance()
    return peaks
