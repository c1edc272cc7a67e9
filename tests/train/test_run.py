"""Whole runs on real ranks: a run that was broken off goes on as if it had not been."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from data.shards import TokenStream
from launch.export import export, from_hydra
from tests.distributed import run_ranks
from tests.tiny import begun
from train.checkpoint import WEIGHTS, load_weights, path_of, remove_after, steps
from train.config import load
from train.records import read_metrics
from train.rundir import RunDir
from train.start import build_model

SMALL = ["model.layers=1", "model.width=32", "model.heads=2"]
PAIRS = ["objective=masked-next-sentence", "model.pair_head=true", "model.dropout=0.1"]
CASES = [
    *[(f"zero{stage}-bf16", [f"engine=zero{stage}"]) for stage in range(4)],
    ("zero2-fp32-accumulated", ["engine.precision=fp32", "micro_batch=2"]),
    ("zero2-dropout", ["model.dropout=0.2", "engine.activation_checkpointing=true"]),
    (
        "zero3-checkpointed",
        ["engine=zero3", "engine.activation_checkpointing=true", "evaluation.prompt=item"],
    ),
    ("zero2-offload", ["engine.offload_optimizer=true"]),
    *[(family, [f"experiment={family}", *SMALL]) for family in ("bert-tiny", "t5-tiny", "llama-tiny")],
    ("ernie-tiny", ["experiment=ernie-tiny", *SMALL, "objective.stages={word:0,phrase:2,entity:4}"]),
    ("chinese", ["experiment=ernie-tiny", *SMALL, "objective=knowledge-chinese"]),
    ("zero3-pairs", ["experiment=bert-tiny", *SMALL, "engine=zero3", *PAIRS]),
    ("zero1-compiled", ["engine=zero1", "engine.compile=true", "evaluation.prompt=item"]),
]


def train_all(directories: list[Path]) -> None:
    """One rank of several runs after one another."""
    from train.config import load
    from train.engine import start_world
    from train.run import Run
    from train.rundir import RunDir
    from train.stop import current

    world = start_world()
    for directory in directories:
        rundir = RunDir(directory)
        run = Run(rundir, load(rundir.config), world)
        with current() as stop:
            assert run.train(stop) is None
        run.close(failed=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By case: a run of 6 steps, and one that lost all after its checkpoint of step 3 and was begun again."""
    folder = tmp_path_factory.mktemp("runs")
    whole = [begun(folder, name, 2, *more) for name, more in CASES]
    run_ranks(train_all, 2, whole)
    broken = []
    for directory in whole:
        copy = directory.with_name(directory.name + "-broken")
        shutil.copytree(directory, copy)
        remove_after(copy / "checkpoints", 3)
        broken.append(copy)
    run_ranks(train_all, 2, broken)
    return {name: pair for (name, _), *pair in zip(CASES, whole, broken, strict=True)}  # type: ignore[misc]


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


@pytest.mark.parametrize("name", [name for name, _ in CASES])
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


@pytest.mark.parametrize("name", [name for name, _ in CASES])
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
    assert [r["event"] for r in broken if r["kind"] == "event"] == ["start", "resume", "finish"]
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
