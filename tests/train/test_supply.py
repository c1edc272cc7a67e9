"""Mixtures and curricula in whole runs: the same samples and losses whatever the ranks, resumed exactly."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.tiny import begun, config, corpus
from tests.train.test_run import train_all
from train.checkpoint import path_of, read_state, remove_after
from train.config import load
from train.objective.causal import Causal
from train.objective.masked import MaskedLM
from train.records import read_metrics
from train.rundir import RunDir
from train.supply import supply

MIXED = ["mixture.weights={a:1,b:3}", "mixture.stages={4:{a:1,b:0}}"]
GROWING = ["curriculum={0:{sequence_length:8,global_batch:16},2:{sequence_length:16},4:{sequence_length:32}}"]
EXACT = ["engine.precision=fp32", "model.layers=1", "model.width=32", "model.heads=2"]


def parts(folder: Path) -> list[str]:
    """Overrides of data with two parts."""
    for name, documents in (("a", 40), ("b", 20)):
        if not (folder / name).exists():
            corpus(folder / name, documents)
    inner = ",".join(f"{name}:{{_target_:data.sources.TextFiles,paths:{folder}/{name}/*}}" for name in "ab")
    source = ["data.source._target_=data.sources.Parts", "~data.source.paths"]
    return [*source, f"+data.source.parts={{{inner}}}", "data.validation._target_=data.split.ByDocument"]


def streamed(folder: Path) -> list[str]:
    """Overrides of a stream of four shards."""
    for name, count in (("rows", 60), ("held-out", 12)):
        lines = [
            json.dumps({"text": f"{name} {i}: item {i * 7 % 10} follows {i}\n" * 9}) for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    rows = "_target_:data.sources.Rows,format:json"
    validation = f"{{_target_:data.split.FromSource,source:{{{rows},paths:{folder}/held-out.jsonl}}}}"
    return [
        *("~data.validation", f"+data.validation={validation}", "+data.shards=4"),
        *("data.source._target_=data.sources.Rows", "+data.source.format=json"),
        f"data.source.paths={folder}/rows.jsonl",
    ]


def remote(folder: Path, local: Path) -> Path:
    """The run `local` on its prepared folder, as if that lay elsewhere."""
    source = RunDir(local).prepared()
    node = [f"+data.address=file://{source}", f"+data.cache={folder}/cache", "+data.cache_bytes=1e6"]
    away = ["~data.source", "~data.validation", f"data.directory={folder}/stand-in", *node]
    directory = begun(folder, "remote", 2, *away, *MIXED, *GROWING, *EXACT)
    assert not list(RunDir(directory).prepared().glob("train-0*"))
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("supply")
    mixed = [*parts(folder), *MIXED, *GROWING, *EXACT]
    found = {name: begun(folder, name, ranks, *mixed) for name, ranks in (("two", 2), ("one", 1))}
    found["micro"] = begun(folder, "micro", 2, *mixed, "micro_batch=1", "engine=zero3")
    stream = [*streamed(folder), *EXACT]
    found |= {
        f"stream-{name}": begun(folder, f"stream-{name}", n, *stream) for name, n in (("two", 2), ("one", 1))
    }
    found["remote"] = remote(folder, found["two"])
    run_ranks(train_all, 2, [found[name] for name in ("two", "micro", "remote", "stream-two")])
    for name in ("two", "stream-two"):
        copy = found[name].with_name(f"{name}-resumed")
        found[copy.name] = Path(shutil.copytree(found[name], copy))
        remove_after(copy / "checkpoints", 3)
    run_ranks(train_all, 2, [found["two-resumed"], found["stream-two-resumed"]])
    # The rest of a run of two ranks, on one.
    found["stream-elastic"] = Path(shutil.copytree(found["stream-two"], folder / "runs" / "stream-elastic"))
    remove_after(found["stream-elastic"] / "checkpoints", 3)
    run_ranks(train_all, 1, [found[name] for name in ("one", "stream-one", "stream-elastic")])
    return found


def records(directory: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize(
    "name", ["one", "micro", "remote", "two-resumed", "stream-one", "stream-two-resumed", "stream-elastic"]
)
def test_losses_agree(runs: dict[str, Path], name: str) -> None:
    source, resumed = "stream-two" if "stream" in name else "two", name.endswith("resumed")
    whole, other = ([r["loss"] for r in records(runs[which])] for which in (source, name))
    assert len(whole) == 6 and len(set(whole)) == 6
    assert other == pytest.approx(whole, abs=0 if resumed else 1e-4)
    first, second = ((runs[which] / "checkpoints") for which in (source, name))
    if resumed:
        weights = "model.safetensors"
        assert (path_of(first, 6) / weights).read_bytes() == (path_of(second, 6) / weights).read_bytes()


def test_a_fork_goes_on_with_a_stream(runs: dict[str, Path]) -> None:
    """Whose text begins where the fork does."""
    folder = runs["two"].parent.parent
    own = [f"fork.run={runs['two']}", "fork.step=3", *streamed(folder), *GROWING, *EXACT]
    forked = begun(folder, "stream-fork", 2, *own)
    run_ranks(train_all, 2, [forked])
    assert [r["step"] for r in records(forked)] == [4, 5, 6]
    shards = read_state(path_of(forked / "checkpoints", 6))["stream"]["of"]
    # Steps 3 to 5 take 40 samples: 10 windows of each shard, which has about 400 bytes to a text.
    assert [shard["window"] for shard in shards.values()] == [14] * 4
    assert all(shard["epoch"] == 0 and shard["reading"]["row"] < 12 for shard in shards.values())
    growing = "curriculum={0:{sequence_length:16,global_batch:16}}"
    with pytest.raises(ValueError, match="^curriculum: differs before step 3, where the fork begins"):
        begun(folder, "stream-fork-2", 2, *own, growing)


def test_a_part_that_is_too_short_is_named(tmp_path: Path) -> None:
    more = parts(tmp_path)
    for path in (tmp_path / "b").iterdir():
        path.write_text("b")
    with pytest.raises(ValueError, match="^data.source.parts.b: sequence_length: a sample takes 64 tokens"):
        begun(tmp_path, "refused", 2, *more, "sequence_length=64")


def test_tokens_and_shares_are_those_asked_for(runs: dict[str, Path]) -> None:
    found = records(runs["two"])
    # 16 sequences of 8, then of 16 and of 32: 4, 8 and 16 samples a step.
    assert [r["tokens"] for r in found] == [128, 256, 512, 768, 1280, 1792]
    drawn = [4, 8, 16, 24, 40, 56]
    for record, samples in zip(found, drawn, strict=True):
        asked = 0.25 * min(samples, 24) + max(0, samples - 24)
        assert record["share/a"] * samples == pytest.approx(asked, abs=1)
        assert record["share/a"] + record["share/b"] == pytest.approx(1)
    model = json.loads((runs["two"] / "model.json").read_text())
    per_token = [(b["flops"] - a["flops"]) / (b["tokens"] - a["tokens"]) for a, b in pairwise(found)]
    assert per_token[-1] == model["training_flops_per_token"]
    assert per_token[0] < per_token[1] < per_token[-1]  # attention is cheaper in shorter sequences


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["mixture.weights={a:0,b:0}"], "mixture.weights: sum to 0"),
        (["mixture.weights={a:-1,b:1}"], "mixture.weights.a: -1 is not"),
        (["mixture.weights={a:1}"], "mixture.weights: b has none"),
        (["mixture.weights={a:1,b:1,c:1}"], "mixture.weights.c: unknown part"),
        (
            ["mixture.temperature=2", "mixture.budgets={a:1,b:1}"],
            "mixture.budgets: mixture.temperature is given",
        ),
        (["mixture.epochs={a:0.1,b:0.1}", "horizon.steps=1000"], "mixture.epochs: every part"),
        (["curriculum={2:{sequence_length:5}}"], "curriculum.2.sequence_length: 5 does not divide"),
        (["curriculum={2:{global_batch:9}}"], "curriculum.2: 9 sequences of 32"),
        (["curriculum={2:{batch:9}}"], "curriculum.2.batch: unknown key"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, more: list[str], line: str) -> None:
    with pytest.raises(ValueError, match="^" + line):
        begun(tmp_path, "refused", 2, *parts(tmp_path), *more)


KNOWLEDGE = [
    *("experiment=ernie-tiny", "objective.phrases=null"),
    *("objective.entities._target_=data.units.Lexicon", "+objective.entities.path={0}/lexicon.txt"),
]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["curriculum={0:{sequence_length:16},6:{sequence_length:32}}"],
            "curriculum.6: begins at step 6, and the horizon is 6 steps; give an earlier step, or a longer",
        ),
        (
            ["mixture.stages={1:{a:1,b:0},2000:{a:0,b:1}}", "horizon.steps=null", "horizon.tokens=1000"],
            "mixture.stages.2000: begins at step 2,000, and the horizon is 4 steps",
        ),
        (
            ["curriculum={900:{global_batch:16}}", "horizon.steps=null", "horizon.epochs=0.1"],
            "curriculum.900: begins at step 900, and the horizon is ",
        ),
        (
            [*KNOWLEDGE, "objective.stages={word:0,phrase:null,entity:7}"],
            "objective.stages.entity: begins at step 7, and the horizon is 6 steps",
        ),
        (
            ["schedule.warmup=7"],
            "schedule.warmup: 7 steps, and the horizon is 6; give fewer, or below 1 a share of them",
        ),
    ],
)
def test_what_lies_beyond_the_horizon_is_refused(tmp_path: Path, more: list[str], line: str) -> None:
    (tmp_path / "lexicon.txt").write_text("item\n")
    own = [*parts(tmp_path), *(one.replace("{0}", str(tmp_path)) for one in more)]
    with pytest.raises(ValueError, match=f"^{re.escape(line)}") as caught:
        begun(tmp_path, "refused", 2, *own)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs" / "refused").exists()


def test_a_horizon_may_be_drawn_in_before_a_stage_and_into_the_warm_up(tmp_path: Path) -> None:
    own = [*parts(tmp_path), *MIXED, *GROWING, "schedule.warmup=6"]
    directory = begun(tmp_path, "drawn-in", 2, *own)
    assert begun(tmp_path, "drawn-in", 2, *own, "horizon.steps=3") == directory
    assert load(directory / "config.yaml").horizon.steps == 3
    begun(tmp_path, "share", 2, *parts(tmp_path), "schedule.warmup=0.9", "horizon.steps=1")


def test_what_was_spent_leaves_out_what_was_passed_over(tmp_path: Path) -> None:
    rundir = RunDir(begun(tmp_path, "spent", 2, *GROWING))
    plan = supply(load(rundir.config), Causal(), rundir.prepared())
    lengths = [8, 8, 16, 16, 32, 32, 32, 32]  # of 16 sequences a step
    for passed_over in ([], [1], [0, 2, 3]):
        order = [length for place, length in enumerate(lengths) if place not in passed_over]
        for step in range(5):
            expected = Counter({length: 16 * length * order[:step].count(length) for length in (8, 16, 32)})
            assert plan.tokens(step, passed_over) == expected


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["horizon.epochs=1", "horizon.steps=null"], "horizon.epochs: a stream has no end"),
        (["packing.method=best_fit"], "packing.method: needs data that is prepared"),
        (["data.shards=100"], "data.shards: 100 are more than the 60 documents"),
        (
            [
                "data.validation._target_=data.split.ByDocument",
                "~data.validation.source",
                "+data.validation.share=0.1",
            ],
            "data.validation: a stream is not read through",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path: Path, more: list[str], line: str) -> None:
    with pytest.raises(ValueError, match="^" + line):
        begun(tmp_path, "refused", 2, *streamed(tmp_path), *more)


def test_a_mixture_needs_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^mixture: the data has no parts to mix"):
        begun(tmp_path, "refused", 1, "mixture.weights={a:1}")


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    directory = begun(tmp_path, "masked", 1, "experiment=bert-tiny", "sequence_length=32")
    prepared = RunDir(directory).prepared()
    growing = config(tmp_path, "sequence_length=32", *GROWING)
    assert supply(growing, Causal(), prepared).steps.lengths == [8, 16, 32]
    with pytest.raises(
        ValueError, match="^curriculum: a sequence of MaskedLM holds 30 tokens of the text in 32"
    ):
        supply(growing, MaskedLM(seed=0), prepared)
