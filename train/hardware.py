"""What the machine could do: the peak that a run's FLOP/s are a share of, and the memory it uses."""

from __future__ import annotations

import os
import re
import resource
import sys
import time

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Dense matrix-product peaks in FLOP/s by datasheet, for bf16 and fp16 tensor cores; without sparsity.
DATASHEET = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,  # fp16 only
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
DATASHEET_FP32 = {"H200": 67e12, "H100 PCIe": 51e12, "H100": 67e12, "A100": 19.5e12, "V100": 15.7e12}


def peak_flops(precision: str) -> float | None:
    """Matrix-product FLOP/s of this device: a GPU's by datasheet (None if unknown), a CPU's measured."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        sheet = DATASHEET_FP32 if precision == "fp32" else DATASHEET
        # Whole words: an L40 is no L4, an A1000 no A100.
        return next((peak for part, peak in sheet.items() if re.search(rf"\b{part}\b", name)), None)
    return measure_matmul(DTYPES[precision])


def measure_matmul(dtype: torch.dtype, size: int = 2048, repeats: int = 4) -> float:
    """FLOP/s of the best of some size x size matrix products with this process's threads."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def total_memory() -> int:
    """Bytes of a GPU's memory, or of this machine's where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_bytes() -> int:
    """Most memory this rank has used so far: of the GPU where there is one, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name() -> str:
    """The GPU's name, or the CPU's where Linux tells it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
