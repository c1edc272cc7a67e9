"""The planner says what the engine allocates, and never that what was run is impossible."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from launch.bench_memory import SHAPES, Bytes, config_of, most_activations, predicted
from launch.memory import Planned
from launch.memory_pass import Tracker
from launch.memory_state import ALIGNMENT, BUCKET, MOST_GATHERED, PERSISTENT
from launch.plan import ELSEWHERE, FITS, IMPOSSIBLE, planned, shown, verdict
from launch.plan_hardware import hardware, sent
from tests.distributed import run_ranks
from tests.tiny import ROOT
from train import hardware as known
from train.config import RunConfig

SMALL = ("model.width=128", "model.heads=2", "model.layers=2")
MEASURED = {  # by one rank: shapes of launch.bench_memory, some of them smaller
    "gpt zero0": SMALL,
    "gpt zero1": SMALL,
    "gpt accumulating": SMALL,
    "gpt offload": SMALL,
    "gpt soap": SMALL,
    "bert checkpointing": (),
    "t5 fp32": (),
    "llama checkpointing zero3": (),
}
HALVED = (*SMALL, "global_batch=8")
SHARED = {
    "gpt zero1": HALVED,
    "gpt zero1 fp32": HALVED,
    "gpt adafactor": HALVED,
    "gpt zero3": HALVED,
}  # by two

MPT = {  # width, heads, layers: scripts/train/yamls/pretrain of llm-foundry
    "125m": (768, 12, 12),
    "3b": (2560, 20, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}
# Rows of scripts/train/benchmarking/README.md of mosaicml/llm-foundry (commit 061f2c7), trained with FSDP:
# model, sequence length, GPUs, GPU, micro batch, activation checkpointing; and what this engine could do.
FOUNDRY = [
    ("70b", 2048, 64, "h100", 8, True, ELSEWHERE),  # it builds the model whole on every rank
    ("30b", 512, 8, "a100-80gb", 12, True, ELSEWHERE),
    ("13b", 2048, 8, "h100", 2, False, FITS),
    ("7b", 65536, 8, "h100", 1, True, FITS),
    ("7b", 2048, 8, "a100-80gb", 6, False, FITS),
    ("3b", 2048, 8, "a100-80gb", 10, False, FITS),
    ("125m", 2048, 8, "a100-80gb", 40, False, FITS),
    ("13b", 2048, 8, "a100-40gb", 4, True, ELSEWHERE),
    ("7b", 2048, 8, "a100-40gb", 12, True, FITS),
    ("3b", 2048, 128, "a100-40gb", 6, False, FITS),
]
# Settings of others: overrides, GPUs, GPU.
OTHERS = {
    # nanoGPT's config/train_gpt2.py: "1 node of 8X A100 40GB", batch 12, block 1024, DDP.
    "nanogpt": (
        ("model=gpt2-124m", "sequence_length=1024", "micro_batch=12", "engine=zero0"),
        8,
        "a100-40gb",
    ),
    # TinyLlama's README and pretrain/tinyllama.py: 16 A100 of 40 GB, micro_batch_size 8, FSDP.
    "tinyllama": (
        ("model=llama-1b", "model.layers=22", "model.kv_heads=4", "model.feedforward_width=5632")
        + ("model.tied=false", "model.vocabulary_size=32000", "sequence_length=2048", "micro_batch=8")
        + ("engine=zero3",),
        16,
        "a100-40gb",
    ),
    # DeepSpeed's docs/_tutorials/zero.md: GPT-2 of 1.5 billion parameters on V100 of 32 GB, batch 1, ZeRO-1.
    "gpt2-1.5b": (
        ("model=gpt2-1.5b", "model.heads=16", "sequence_length=1024", "micro_batch=1", "engine=zero1")
        + ("engine.precision=fp16",),
        8,
        "v100-32gb",
    ),
    # Llama 2 7B on a node of A100 of 80 GB, as FSDP trained the 7b above.
    "llama-7b": (("experiment=llama-7b", "micro_batch=1"), 8, "a100-80gb"),
}


def on_this_rank(chosen: dict[str, tuple[str, ...]]) -> dict[str, Bytes]:
    from launch.bench_memory import measured
    from train.engine import start_world

    world = start_world()
    return {name: measured(config_of(*SHAPES[name], *more), world) for name, more in chosen.items()}


def gpt(size: str, length: int, gpus: int, micro: int, checkpointing: bool) -> RunConfig:
    width, heads, layers = MPT[size]
    return config_of(
        *("model=gpt2-124m", "model.vocabulary_size=50432", "engine=zero3", f"sequence_length={length}"),
        *(f"model.width={width}", f"model.heads={heads}", f"model.layers={layers}"),
        *(f"micro_batch={micro}", f"global_batch={micro * gpus}"),
        f"engine.activation_checkpointing={str(checkpointing).lower()}",
    )


def plan(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return planned(compose("plan", overrides=list(overrides)))


@pytest.fixture(scope="module")
def real() -> dict[str, Bytes]:
    return run_ranks(on_this_rank, 1, MEASURED)[0]


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_predicted_is_what_the_engine_allocates(real: dict[str, Bytes], name: str) -> None:
    own, found = predicted(config_of(*SHAPES[name], *MEASURED[name])), real[name]
    assert own.state == pytest.approx(found.state, rel=0.02)
    assert own.activations == pytest.approx(found.activations, rel=0.15)
    assert own.peak == pytest.approx(found.peak, rel=0.02)


def test_state_is_shared_by_two_ranks_as_predicted() -> None:
    ranks = run_ranks(on_this_rank, 2, SHARED)
    for name, more in SHARED.items():
        config = config_of(*SHAPES[name], *more)
        alone, own = predicted(config), predicted(config, ranks=2)
        assert own.state == pytest.approx(max(rank[name].state for rank in ranks), rel=0.02), name
        assert own.state < 0.75 * alone.state, name


def test_offloaded_parts_are_in_the_hosts_memory_of_a_gpu_only() -> None:
    config = config_of(*SHAPES["gpt"], *SMALL)
    offloading = config_of(*SHAPES["gpt offload"], *SMALL)
    usual, with_host = (Planned(one, 1, 512, gpu=True).at(4) for one in (config, offloading))
    assert usual.host == 0
    assert with_host.masters == with_host.optimizer == 0
    assert with_host.host > usual.masters + usual.optimizer
    assert with_host.peak < usual.peak
    assert Planned(offloading, 1, 512, gpu=False).at(4).host == 0


def test_constants_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig()
    assert defaults.reduce_bucket_size == BUCKET
    assert defaults.max_live_parameters == MOST_GATHERED
    assert defaults.param_persistence_threshold == PERSISTENT
    assert ALIGNMENT == 2
    assert defaults.use_multi_rank_bucket_allreduce  # which is what `sent` counts


@pytest.mark.parametrize("row", FOUNDRY, ids=lambda row: "-".join(map(str, row[:5])))
def test_what_others_trained_is_not_called_impossible(row: Any) -> None:
    size, length, gpus, gpu, micro, checkpointing, expected = row
    config = gpt(size, length, gpus, micro, checkpointing)
    memory = Planned(config, gpus, 50432, gpu=True).at(micro)
    device = hardware(gpu, "bf16").memory
    assert verdict(memory, device - 1e9) == expected
    # These micro batches were chosen to fill the GPU: what is predicted may not be far too little either.
    assert memory.peak > 0.3 * device


@pytest.mark.parametrize("name", OTHERS)
def test_published_settings_fit(name: str) -> None:
    overrides, gpus, gpu = OTHERS[name]
    config = config_of(*overrides, "global_batch=1024" if "llama-7b" in name else f"global_batch={gpus * 96}")
    memory = Planned(config, gpus, 32000 if "llama" in name else 50257, gpu=True).at(config.micro_batch or 1)
    assert verdict(memory, hardware(gpu, config.engine.precision).memory - 1e9) == FITS


def test_ten_billion_on_v100_are_for_another_engine() -> None:
    """DeepSpeed's docs/_tutorials/zero.md: 50 layers x 4096 on 32 V100 of 32 GB, batch 1, ZeRO-2."""
    config = config_of(
        *("model=gpt2-1.5b", "model.width=4096", "model.layers=50", "model.heads=32", "engine=zero2"),
        *("sequence_length=1024", "micro_batch=1", "global_batch=32", "engine.precision=fp16"),
        "engine.activation_checkpointing=true",
    )
    memory = Planned(config, 32, 50257, gpu=True).at(1)
    assert memory.phase == "building the model"
    assert verdict(memory, hardware("v100-32gb", "fp16").memory - 1e9) == ELSEWHERE


def test_what_cannot_be_is_called_impossible() -> None:
    memory = Planned(
        config_of("experiment=llama-7b", "engine=zero0", "micro_batch=1"), 8, 32000, gpu=True
    ).at(1)
    assert memory.least > 16 * 6.7e9  # 2 + 2 + 12 bytes a parameter (arXiv 1910.02054, section 3.1)
    assert verdict(memory, hardware("a100-80gb", "bf16").memory) == IMPOSSIBLE


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    for overrides in (SHAPES["gpt"], SHAPES["t5 checkpointing"]):
        own = Planned(
            config_of(*overrides, *(SMALL if overrides[0] == "model=gpt-mini" else ())), 1, 512, gpu=True
        )
        for memory in (1.2e9, 3e9):
            largest = own.largest(memory)
            assert own.at(largest).peak <= memory < own.at(largest + 1).peak
        assert own.largest(1e8) == 0


def test_gpu_kernels_keep_no_scores() -> None:
    """Attention's memory grows with the length, not its square (arXiv 2205.14135, section 3.1)."""

    def activations(length: int, *more: str) -> int:
        shape = ("model=gpt-mini", f"sequence_length={length}", "micro_batch=1", "global_batch=1", *SMALL)
        return Planned(config_of(*shape, *more), 1, 512, gpu=True).at(1).activations

    assert activations(4096) < 2.1 * activations(2048)
    assert activations(2048, "model.dropout=0.1") < 1.5 * activations(2048)
    assert activations(2048, "engine.activation_checkpointing=true") < 0.8 * activations(2048)


def test_a_tracker_counts_what_lives() -> None:
    with Tracker() as tracker:
        a = torch.ones(1000)
        b = a + 1
        view = b[:10]
        assert tracker.live == 8000
        del a, b
        assert tracker.live == 4000  # which the view holds
        del view
    assert (tracker.live, tracker.most) == (0, 8000)
    layer = nn.Linear(10, 20, bias=False)
    tracker = Tracker()
    tracker.leave_out(list(layer.parameters()))
    layer.weight.register_post_accumulate_grad_hook(lambda weight: tracker.take_gradient(weight, 4))
    with tracker:
        layer(torch.ones(5, 10)).sum().backward()
    assert tracker.gradients == 10 * 20 * 4
    assert tracker.most_with_gradients >= tracker.most_backward >= tracker.gradients


def test_the_record_is_read_between_marks() -> None:
    events = [
        *[("", 1, 500), ("begin", 0, 0), ("", 2, 100), ("", 3, 40), ("", 3, -40), ("", 4, 30)],
        *[("gradient 4", 0, 0), ("", 5, 999), ("end of gradient", 0, 0), ("", 6, 60), ("gradient 6", 0, 0)],
        *[("end of gradient", 0, 0), ("", 7, 5000)],
    ]
    assert (
        most_activations(events) == 160
    )  # 100 + 60; not 500, nor 999 of DeepSpeed, nor what is after it all


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "conf" / "hardware").glob("*.yaml")])
def test_every_device_is_described(name: str) -> None:
    device = hardware(name, "bf16")
    assert device.memory > 2e10
    assert device.devices >= 1
    assert set(device.peak) == {"bf16", "fp16", "fp32"}
    spelled = {part.lower().replace(" ", "-"): part for part in known.DATASHEET}
    part = spelled.get(name.removesuffix("-40gb").removesuffix("-80gb").removesuffix("-32gb"))
    if part:  # known to the MFU of a run, too
        assert device.peak["fp16"] == pytest.approx(known.DATASHEET[part], rel=0.01)
        if part in known.DATASHEET_FP32:
            assert device.peak["fp32"] == known.DATASHEET_FP32[part]


def test_speed_time_and_cost_follow_from_what_is_assumed() -> None:
    device = "plan.hardware=a100-80gb", "plan.memory=3e9", "plan.ranks=8", "plan.share=0.5"
    common = ("experiment=demo", "engine=zero1", "horizon.steps=null", "horizon.tokens=1e7", *device)
    result = plan(*common, "plan.price=2")
    assert result["tokens"] == math.ceil(1e7 / 256 / 16) * 256 * 16
    computing = result["flops"] / (0.5 * 312e12 * 8)
    traffic = 3 * result["parameters"] * 2 * 7 / 8  # bf16: gradients there and back, weights
    assert sum(result["sent_per_step"].values()) == pytest.approx(traffic)
    assert result["seconds"] == pytest.approx(computing + result["steps"] * traffic / 300e9)
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
    assert result["cost"] == pytest.approx(result["seconds"] / 3600 * 8 * 2)
    again = plan(*common, "engine.activation_checkpointing=true")
    assert again["flops"] == result["flops"]
    assert again["step_seconds"]["computing"] == pytest.approx(4 / 3 * computing / result["steps"])


@pytest.mark.parametrize(
    ("size", "length", "checkpointing", "share", "tokens"),
    [("7b", 2048, False, 0.6423, 4641), ("7b", 4096, True, 0.7312, 3684), ("13b", 2048, False, 0.5957, 2262)],
)
def test_the_speed_is_the_published_at_the_published_share(
    size: str, length: int, checkpointing: bool, share: float, tokens: int
) -> None:
    """On eight A100 of 80 GB: tokens a second and GPU at the MFU, or HFU, of llm-foundry's table."""
    width, heads, layers = MPT[size]
    result = plan(
        *("model=gpt2-124m", "model.vocabulary_size=50432", "engine=zero3", f"sequence_length={length}"),
        *(f"model.width={width}", f"model.heads={heads}", f"model.layers={layers}", "global_batch=64"),
        *("micro_batch=8", f"engine.activation_checkpointing={str(checkpointing).lower()}"),
        *("horizon.epochs=null", "horizon.steps=1", "plan.hardware=a100-80gb", "plan.ranks=8"),
        *(f"plan.share={share}", "plan.memory=2e9"),
    )
    assert result["tokens_per_second"] / 8 == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize(
    ("stage", "volume"), [(0, 2), (1, 2 + 1), (2, 2 * 4 + 1), (3, 3 * 4)], ids=lambda value: str(value)
)
def test_what_is_sent_by_stage(stage: int, volume: int) -> None:
    """In elements of every parameter, with four micro batches on 2 ranks (arXiv 1910.02054, section 7)."""
    shape = ("model=gpt-mini", *SMALL, "micro_batch=1", "global_batch=8", "engine.precision=fp32")
    own = Planned(config_of(*shape, f"engine.zero_stage={stage}"), 2, 512, gpu=True)
    total = sum(parameter.numel() for parameter in own.model.parameters())
    assert sum(sent(own).values()) == pytest.approx(volume * total * 4 / 2)
    assert sum(sent(Planned(own.config, 1, 512, gpu=True)).values()) == 0


def test_a_curriculums_tokens_are_counted_by_length() -> None:
    device = "plan.hardware=a100-40gb", "plan.memory=2.1e9"
    shape = ("model=gpt-nano", "tokenizer=bytes", "sequence_length=64", "global_batch=8", *device)
    steps = plan(*shape, "horizon.epochs=null", "horizon.steps=10", "curriculum={4:{global_batch:16}}")
    assert steps["tokens"] == (4 * 8 + 6 * 16) * 64
    epochs = plan(*shape, "horizon.epochs=2", "plan.dataset_tokens=6400")
    assert epochs["steps"] == math.ceil(2 * 100 / 8)


def test_a_cpus_peak_is_measured_and_its_memory_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.plan_hardware.peak_flops", lambda precision: 1e11)
    result = plan("experiment=bert-tiny", "plan.memory=3e9")
    assert result["hardware"]["cpu"] and result["hardware"]["measured"]
    assert result["usable"] == result["hardware"]["memory"] / 2
    assert result["step_seconds"]["computing"] * result["steps"] == pytest.approx(
        result["flops"] / 1e11 / 0.4
    )
    assert result["step_seconds"]["sending"] == 0


BAD = {
    "plan.hardware: tpu is none of here, a100-40gb": ("plan.hardware=tpu",),
    "horizon: nothing is set": ("horizon.steps=null",),
    "horizon.epochs: the length of an epoch": ("horizon.steps=null", "horizon.epochs=1"),
    "plan.share: 40.0 is not above 0 and at most 1": ("plan.share=40",),
    "plan.memory: -1.0 is not a positive number": ("plan.memory=-1",),
    "plan.reserve: 5e+10 bytes leave nothing": ("plan.reserve=5e10",),
    "plan.price: -1.0 is negative": ("plan.price=-1",),
    "plan.ranks: ": ("plan.ranks=many",),
    "plan.peak: nothing is known of v100-32gb in bf16": ("plan.hardware=v100-32gb",),
    "plan.network: is not known of l40s": ("plan.hardware=l40s", "plan.ranks=16"),
    "global_batch: 16 cannot be shared by 5 ranks": ("plan.ranks=5",),
    "plan.vocabulary: how many tokens": ("tokenizer=characters",),
    "objective: Causal trains a model of family decoder": ("model=bert-tiny",),
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_end_in_one_line(message: str) -> None:
    with pytest.raises(ValueError) as raised:
        plan("experiment=demo", "plan.hardware=a100-40gb", *BAD[message])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_the_plan_is_told_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result = plan("experiment=demo", "plan.hardware=rtx-4090", "plan.price=1", "plan.memory=2e9")
    assert json.loads(json.dumps(result)) == result
    console = Console(highlight=False, width=120)
    for part in shown(result):
        console.print(part)
    told = capsys.readouterr().out
    assert "impossible" not in told and "does not fit, for buckets" in told  # of 1 GB
    assert "assumed: 40% of a peak of 165 TFLOP/s" in told
    assert "cost" in told
