"""Whole runs on real ranks: a run that was broken off goes on as if it had not been."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from data.order import Order
from data.shards import TokenStream
from launch.export import export, from_hydra
from tests.distributed import run_ranks
from tests.tiny import begun
from train.checkpoint import MANIFEST, WEIGHTS, load_weights, path_of, remove_after, steps
from train.config import load
from train.records import read_metrics
from train.rundir import RunDir
from train.start import build_model

SMALL = ["model.layers=1", "model.width=32", "model.heads=2"]
STAGED = "objective.stages={word:0,phrase:2,entity:4}"
PAIRS = ["objective=masked-next-sentence", "model.pair_head=true", "model.dropout=0.1"]

CASES = [
    ("windowed", ["log.every=4"]),  # and so broken off in the middle of what it logs
    ("synchronous", ["engine=zero2", "checkpoint.asynchronous=false"]),  # besides, it is zero2-bf16
    *[(f"zero{stage}-bf16", [f"engine=zero{stage}"]) for stage in range(4)],
    ("zero2-fp32-accumulated", ["engine.precision=fp32", "micro_batch=2"]),
    ("zero2-dropout", ["model.dropout=0.2", "engine.activation_checkpointing=true"]),
    (
        "zero3-checkpointed",
        ["engine=zero3", "engine.activation_checkpointing=true", "evaluation.prompt=item"],
    ),
    ("zero2-offload", ["engine.offload_optimizer=true"]),
    *[(family, [f"experiment={family}", *SMALL]) for family in ("bert-tiny", "t5-tiny", "llama-tiny")],
    ("ernie-tiny", ["experiment=ernie-tiny", *SMALL, STAGED]),
    ("chinese", ["experiment=ernie-tiny", *SMALL, "objective=knowledge-chinese", STAGED]),
    ("zero3-pairs", ["experiment=bert-tiny", *SMALL, "engine=zero3", *PAIRS]),
    ("zero2-muon", ["engine=zero2", "optim=muon", "model.width=33", "model.heads=3"]),
    ("zero3-soap", ["engine=zero3", "optim=soap"]),
    ("zero0-shampoo", ["engine=zero0", "optim=shampoo", *SMALL]),
    ("zero3-adafactor", ["engine=zero3", "optim=adafactor", *SMALL]),
    *[(f"zero{s}-schedule-free", [f"engine=zero{s}", "optim=schedule-free", *SMALL]) for s in (0, 2, 3)],
    ("zero1-adabound", ["engine=zero1", "optim=adabound", *SMALL]),
    ("zero2-nadam", ["engine=zero2", "optim=nadam", *SMALL]),
    ("zero1-compiled", ["engine=zero1", "engine.compile=true", "evaluation.prompt=item"]),
    ("epochs", ["experiment=bert-tiny", *SMALL, "sequence_length=512", "global_batch=16"]),
    *[(f"zero{stage}-fp16", [f"engine=zero{stage}", "engine.precision=fp16", *SMALL]) for stage in range(4)],
]


def train_all(directories: list[Path]) -> None:
    """One rank of several runs after one another."""
    from train.config import load
    from train.engine import start_world
    from train.run import Run
    from train.rundir import RunDir
    from train.stop import current

    hurry()
    world = start_world()
    for directory in directories:
        # Has memory begin as NaN instead of anything, all of DeepSpeed's buffers too, which takes its time.
        torch.use_deterministic_algorithms(directory.name.startswith("zero3-pairs"), warn_only=True)
        rundir = RunDir(directory)
        config = load(rundir.config)
        with fp16_here(17, 1) if config.engine.precision == "fp16" else nullcontext():
            run = Run(rundir, config, world)
            with current() as stop:
                assert run.train(stop) is None
            run.close(failed=False)


def hurry() -> None:
    """Spare what takes most of the time in engines this small: DeepSpeed's garbage collections, which look at
    all that was ever imported, and measuring the CPU's peak anew for each run."""
    from train import hardware

    gc.freeze()
    hardware.peak_flops = cache(hardware.peak_flops)


@contextmanager
def fp16_here(scale_power: int, window: int) -> Iterator[None]:
    """Has DeepSpeed train in fp16 on a CPU, which it refuses only because it takes CPUs for too slow.

    All that is computed is real. The rate of large products, minutes of fp16 on a CPU, is not measured.
    scale_power: the loss scale's first exponent; at 17, the first step of the models here overflows. window:
    steps without overflow after which the scale is doubled.
    """
    from deepspeed.accelerator import get_accelerator

    from train import deepspeed_config, hardware

    derive = deepspeed_config.derive
    scale = {"initial_scale_power": scale_power, "loss_scale_window": window}

    def derived(*arguments: Any) -> dict[str, Any]:
        return derive(*arguments) | {"fp16": {"enabled": True, **scale}}

    with (
        mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True),
        mock.patch.object(hardware, "peak_flops", lambda precision: None),
        mock.patch.object(deepspeed_config, "derive", derived),
    ):
        yield


class StopAfterAStep:
    """In the place of a `Stop`: has a run end once it is a step further, or in the evaluation after that."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def training(self, grace: float, time_limit: float | None) -> None:
        self.first = self.run.done

    def saved(self) -> None: ...

    @property
    def requested(self) -> str | None:
        return "a test" if self.run.done > self.first else None


def resume_all(broken: list[Path], often: Path, unsaved: Path) -> None:
    """One rank of the broken-off runs, of one that goes on one step at a time, and of one that cannot
    save."""
    from train.config import load
    from train.engine import start_world
    from train.run import Halted, Run
    from train.rundir import RunDir

    train_all(broken)
    reasons = []
    for _ in range(7):
        rundir = RunDir(often)
        run = Run(rundir, load(rundir.config), start_world())
        reasons.append(run.train(StopAfterAStep(run)))  # type: ignore[arg-type]
        run.close(failed=False)
    assert reasons == ["a test"] * 6 + [None]  # the sixth in the last evaluation
    run = Run(RunDir(unsaved), load(RunDir(unsaved).config), start_world())
    with pytest.raises(Halted, match="^a test: step 1 could not be saved, there is no checkpoint; make room"):
        run.train(StopAfterAStep(run))  # type: ignore[arg-type]
    run.close(failed=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By case: a run of 6 steps, and one that lost all after its checkpoint of step 3 and was begun again."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.start.check_device", lambda config: None)  # which refuses fp16 on a CPU
        whole = [begun(folder, name, 2, *more) for name, more in CASES]
    often = begun(folder, "often", 2, *dict(CASES)["zero2-dropout"])
    run_ranks(train_all, 2, whole)
    broken = []
    for directory in whole:
        copy = directory.with_name(directory.name + "-broken")
        shutil.copytree(directory, copy)
        remove_after(copy / "checkpoints", 3)
        broken.append(copy)
    unsaved = begun(folder, "unsaved", 2)
    (unsaved / "checkpoints").touch()
    run_ranks(resume_all, 2, broken, often, unsaved)
    pairs: Any = {name: pair for (name, _), *pair in zip(CASES, whole, broken, strict=True)}
    return pairs | {"often": (pairs["zero2-dropout"][0], often)}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a file that DeepSpeed wrote, by its place in it."""
    found = {}

    def walk(node: Any, place: str) -> None:
        if torch.is_tensor(node):
            found[place] = node
        elif isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{place}/{key}")
        elif isinstance(node, list | tuple):
            for index, value in enumerate(node):
                walk(value, f"{place}/{index}")

    walk(torch.load(path, weights_only=False), "")
    return found


@pytest.mark.parametrize("name", [*dict(CASES), "often"])
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(runs: Any, name: str) -> None:
    whole, broken = (path_of(directory / "checkpoints", 6) for directory in runs[name])
    first, second = load_file(whole / WEIGHTS), load_file(broken / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = load_file(path_of(whole.parent, 3) / WEIGHTS)
    assert any(not torch.equal(first[key], start[key]) for key in first)
    files = sorted(path.name for path in whole.glob("*.pt"))
    assert files
    for file in files:
        expected, got = tensors(whole / file), tensors(broken / file)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[place], got[place]) for place in expected), file


def scaler(path: Path) -> dict[str, Any]:
    """The state of fp16's dynamic loss scale in a checkpoint, the same on all ranks."""
    found = []
    for file in path.glob("*.pt"):
        content = torch.load(file, weights_only=False)
        if "loss_scaler" in content.get("optimizer_state_dict", {}):
            found.append(vars(content["optimizer_state_dict"]["loss_scaler"]))
        elif content.get("optimizer"):  # without ZeRO
            state = content["optimizer"].items()
            found.append({key: value for key, value in state if isinstance(value, int | float)})
    assert found and all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("stage", range(4))
def test_the_loss_scale_goes_on_in_the_middle_of_its_window(runs: Any, stage: int) -> None:
    """Steps overflow before and after the checkpoint, and between them the scale is raised."""
    whole, broken = (directory / "checkpoints" for directory in runs[f"zero{stage}-fp16"])
    assert scaler(path_of(whole, 6)) == scaler(path_of(broken, 6))
    assert scaler(path_of(whole, 3)) != scaler(path_of(whole, 6))
    records = read_metrics(runs[f"zero{stage}-fp16"][1] / "metrics.jsonl")
    skipped = [r["skipped_steps"] for r in records if r["kind"] == "train"]
    assert set(skipped[:3]) == set(skipped[3:]) == {0, 1}


def test_a_run_is_resumed_in_a_later_epoch(runs: Any) -> None:
    """Where other tokens are masked than in the epochs before."""
    rundir = RunDir(runs["epochs"][0])
    config = load(rundir.config)
    samples = TokenStream(rundir.prepared(), "train").tokens // config.sequence_length
    assert Order(samples, config.global_batch, config.seed).epochs(3).min() >= 2


def test_it_is_all_the_same_when_a_checkpoint_is_written(runs: Any) -> None:
    while_training, at_once = (runs[name][0] / "checkpoints" for name in ("zero2-bf16", "synchronous"))
    for step in (3, 6):
        first, second = (path_of(folder, step) / MANIFEST for folder in (while_training, at_once))
        assert first.read_text() == second.read_text()


@pytest.mark.parametrize("name", ["zero2-bf16", "bert-tiny", "t5-tiny", "llama-tiny"])
def test_what_is_known_before_the_first_step_is_logged(runs: Any, name: str) -> None:
    (packing,), (baseline,) = (
        [record for record in read_metrics(runs[name][0] / "metrics.jsonl") if record["kind"] == kind]
        for kind in ("packing", "baseline")
    )
    assert 0.9 < packing["used_share"] <= 1
    assert packing["cut_documents"] > 0 or name == "llama-tiny"
    vocabulary = TokenStream(RunDir(runs[name][0]).prepared(), "train").vocabulary_size
    assert 0 < baseline["unigram_loss"] < math.log(vocabulary)


def test_a_run_starts_from_the_weights_of_another(runs: Any, tmp_path: Path) -> None:
    """A first step without learning leaves the loss of the run that the weights were taken from."""
    source = runs["zero2-bf16"][0]
    wanted = {"run": str(source), "format": "hf", "directory": str(tmp_path / "hf"), "checkpoint": "latest"}
    folder, _ = export(from_hydra(OmegaConf.create(wanted)))
    still = ["horizon.steps=1", "optim.learning_rate=1e-12", f"model.init_from={folder}"]
    directory = begun(source.parent.parent, "from-another", 1, *still)
    run_ranks(train_all, 1, [directory])
    evaluated, (after,) = (
        [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"]
        for run in (source, directory)
    )
    before = evaluated[-1]
    assert after["loss"] == pytest.approx(before["loss"], abs=2e-2)
    assert after["loss"] < evaluated[0]["loss"] - 0.1  # which is that of the source after 3 of its 6 steps


def test_a_broken_off_window_of_the_log_goes_on(runs: Any) -> None:
    whole, broken = (
        [r for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "train"]
        for directory in runs["windowed"]
    )
    single = [
        r["loss"] for r in read_metrics(runs["zero2-bf16"][0] / "metrics.jsonl") if r["kind"] == "train"
    ]
    assert [r["step"] for r in whole] == [r["step"] for r in broken] == [4, 6]
    for one, other, losses in zip(whole, broken, (single[:4], single[4:]), strict=True):
        assert one["loss"] == other["loss"]
        assert one["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("name", [*(name for name, _ in CASES if name != "windowed"), "often"])
def test_the_metrics_of_a_resumed_run_have_no_seam(runs: Any, name: str) -> None:
    whole, broken = (read_metrics(directory / "metrics.jsonl") for directory in runs[name])
    for kind, key in (
        ("train", "loss"),
        ("train", "learning_rate"),
        ("train", "gradient_norm"),
        ("eval", "loss"),
    ):
        expected = [(r["step"], r[key]) for r in whole if r["kind"] == kind]
        assert expected == [(r["step"], r[key]) for r in broken if r["kind"] == kind]
    assert [r["step"] for r in whole if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    breaks = ["interrupt", "resume"] * 6 if name == "often" else ["resume"]
    assert [r["event"] for r in broken if r["kind"] == "event"] == ["start", *breaks, "finish"]
    times = [r["elapsed_s"] for r in broken]
    assert times == sorted(times)


def test_the_record_of_a_run(runs: Any) -> None:
    directory, _ = runs["zero2-bf16"]
    assert steps(directory / "checkpoints") == [3, 6]
    deepspeed = json.loads((directory / "deepspeed.json").read_text())
    assert deepspeed["zero_optimization"]["stage"] == 2 and deepspeed["bf16"] == {"enabled": True}
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["packages"]["torch"] == torch.__version__
    model = json.loads((directory / "model.json").read_text())
    weights = load_file(path_of(directory / "checkpoints", 6) / WEIGHTS)
    assert model["parameters"] == sum(tensor.numel() for tensor in weights.values())
    train = [r for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["tokens"] for r in train] == [256 * step for step in range(1, 7)]
    assert train[-1]["flops"] == 6 * 256 * model["training_flops_per_token"]
    assert 0 <= train[-1]["data_wait_share"] < 1


def test_rates_are_those_of_the_clock(runs: Any) -> None:
    """Tokens over tokens per second adds up to no more than the run took, and to a good part of it."""
    directory, _ = runs["zero2-bf16"]
    records = read_metrics(directory / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    seconds = sum(256 / r["tokens_per_s"] for r in train)
    assert 0.2 * records[-1]["elapsed_s"] < seconds <= records[-1]["elapsed_s"]
    per_token = train[0]["flops"] / 256
    assert train[0]["flops_per_s"] / train[0]["tokens_per_s"] == pytest.approx(per_token)


def test_evaluation_is_the_loss_of_the_saved_weights_over_all_held_out_text(runs: Any) -> None:
    directory, _ = runs["zero2-fp32-accumulated"]
    record = [r for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "eval"][-1]
    rundir = RunDir(directory)
    config, stream = load(rundir.config), TokenStream(rundir.prepared(), "validation")
    model = build_model(config, stream.vocabulary_size)
    load_weights(model, rundir.checkpoints)
    tokens = np.concatenate([[stream.end_of_text], stream.read(0, stream.tokens)]).astype(np.int64)
    nats = 0.0
    for start in range(0, stream.tokens, config.sequence_length):
        piece = torch.from_numpy(tokens[start : start + config.sequence_length + 1])
        logits = model(piece[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
    assert record["tokens_evaluated"] == stream.tokens
    assert record["bytes_evaluated"] == stream.bytes
    assert record["loss"] == pytest.approx(nats / stream.tokens, rel=1e-5)
    assert record["perplexity"] == pytest.approx(math.exp(nats / stream.tokens), rel=1e-4)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / stream.bytes, rel=1e-5)


@pytest.mark.parametrize("name", ["zero3-checkpointed", "zero1-compiled"])
def test_samples_are_drawn_on_every_stage(runs: Any, name: str) -> None:
    whole, broken = (
        [r["text"] for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "sample"]
        for directory in runs[name]
    )
    assert len(whole) == 2 and all(whole)
    assert whole == broken
