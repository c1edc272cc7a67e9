"""What the machine could do, against what is known of it."""

from __future__ import annotations

import pytest
import torch

from train import hardware


def test_a_peak_is_flop_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 22.0])  # products of 9, 0.5 and 2 seconds
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    assert hardware.measure_matmul(torch.float32, size=10, repeats=2) == 2 * 10**3 / 0.5


def test_a_measured_peak_is_that_of_a_computer() -> None:
    assert 1e8 < hardware.measure_matmul(torch.float32, size=512, repeats=10) < 1e15


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, None),
        ("NVIDIA L4", 121e12, None),
        ("NVIDIA L40S", 362e12, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("NVIDIA GeForce RTX 4090", 165e12, None),
        ("A GPU of tomorrow", None, None),
    ],
)
def test_a_known_gpu_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: float | None, fp32: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert hardware.peak_flops("bf16") == bf16
    assert hardware.peak_flops("fp32") == fp32
    assert hardware.device_name() == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory of a GPU counts there")
def test_memory_grows_by_what_is_allocated() -> None:
    """By its most so far: so what is allocated must go beyond what the process ever held."""
    before = hardware.memory_bytes()
    block = torch.ones(before + 2**26, dtype=torch.uint8)
    grown = hardware.memory_bytes()
    assert before + 2**26 <= grown < 3 * before + 2**27
    del block
    assert hardware.memory_bytes() >= grown


def test_the_device_has_a_name() -> None:
    assert hardware.device_name().strip()
