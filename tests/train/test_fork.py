"""A fork goes on from its parent's checkpoint; what it shares with the parent cannot be changed."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.killing import killed_at
from tests.tiny import begun, config, corpus
from tests.train.test_run import train_all
from train import start
from train.checkpoint import LATEST, STATE, WEIGHTS, damage, path_of, steps
from train.config import load
from train.fork import KEPT, fork_step, take_checkpoint
from train.records import read_metrics
from train.rundir import RunDir

# The vocabulary depends on the text, and takes its place in the model.
PARENT = [
    *("tokenizer=characters", "checkpoint.keep=9", "evaluation.every=null"),
    *("model.layers=1", "model.width=32", "model.heads=2"),
]
OTHER = ["data.source.paths={0}/other/*.txt"]
FORKS = {
    "same": [],
    "schedule": ["schedule=linear"],
    "decay": ["optim.weight_decay=2"],
    "seed": ["seed=1"],
    "longer": ["fork.step=null", "horizon.steps=9"],
    "other": [*OTHER, "tokenizer=bytes"],
    "elastic": ["engine=zero3", "optim.weight_decay=2"],
}
STABLE = ["schedule=wsd", "schedule.decay=2", "horizon.steps=8"]
DECAYED = ["schedule.decay=3", "horizon.steps=6"]  # from step 3 on
UNBROKEN = {"stable": STABLE, "decayed": [*STABLE, *DECAYED]}


def fork(folder: Path, name: str, *more: str, parent: str = "parent") -> Path:
    """A begun fork from step 3 of a run in `folder`, unless `more` says otherwise."""
    own = [f"fork.run={folder}/runs/{parent}", "fork.step=3", *PARENT, *more]
    return begun(folder, name, 1, *(one.replace("{0}", str(folder)) for one in own))


def trained(folder: Path) -> None:
    """One rank: a parent, its forks, and a fork of a fork; a stable run, and a decay of it."""
    train_all([begun(folder, "parent", 1, *PARENT)])
    train_all([fork(folder, name, *more) for name, more in FORKS.items()])
    train_all([fork(folder, "grandchild", "horizon.steps=7", *OTHER, "fork.step=6", parent="other")])
    train_all([begun(folder, name, 1, *PARENT, *own) for name, own in UNBROKEN.items()])
    train_all([fork(folder, "branched", *STABLE, *DECAYED, parent="stable")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forks")
    corpus(folder / "text")
    (folder / "other").mkdir()
    for file in (folder / "text").iterdir():
        (folder / "other" / file.name).write_text(file.read_text().replace("follows", "precedes, ünknown:"))
    run_ranks(trained, 1, folder)
    return folder / "runs"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(path_of(run / "checkpoints", step) / WEIGHTS)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train_records(run: Path) -> dict[int, dict[str, Any]]:
    return {
        record["step"]: record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"
    }


def test_a_fork_that_changes_nothing_goes_on_as_its_parent_did(runs: Path) -> None:
    assert equal(weights(runs / "same", 6), weights(runs / "parent", 6))
    assert not equal(weights(runs / "same", 3), weights(runs / "same", 6))
    ours, theirs = train_records(runs / "same"), train_records(runs / "parent")
    assert list(ours) == [4, 5, 6]
    for key in ("loss", "gradient_norm", "learning_rate", "tokens"):
        assert [ours[step][key] for step in ours] == [theirs[step][key] for step in ours]


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_starts_from_its_parents_weights_and_keeps_them_whole(runs: Path, name: str) -> None:
    taken = 6 if name == "longer" else 3
    assert equal(weights(runs / name, taken), weights(runs / "parent", taken))
    assert steps(runs / name / "checkpoints")[0] == taken
    for step in steps(runs / name / "checkpoints"):
        assert damage(path_of(runs / name / "checkpoints", step)) is None
    one, other = (path_of(runs / run / "checkpoints", taken) / WEIGHTS for run in (name, "parent"))
    assert one.samefile(other)
    assert json.loads((runs / name / "fork.json").read_text())["parent_step"] == taken


@pytest.mark.parametrize("name", sorted(FORKS.keys() - {"same", "longer"}))
def test_what_a_fork_changes_takes_effect(runs: Path, name: str) -> None:
    assert not equal(weights(runs / name, 6), weights(runs / "parent", 6))


def test_the_effect_is_that_of_the_change(runs: Path) -> None:
    same, schedule, other = (train_records(runs / name) for name in ("same", "schedule", "other"))
    assert schedule[4]["loss"] == same[4]["loss"]  # the same weights on the same batch
    assert schedule[6]["learning_rate"] < same[6]["learning_rate"]
    assert other[4]["loss"] != same[4]["loss"]
    (total,) = {sum(p.square().sum().item() for p in weights(runs / "same", 6).values())}
    for name in ("decay", "elastic"):
        assert sum(p.square().sum().item() for p in weights(runs / name, 6).values()) < total


def test_a_decay_is_branched_off_a_stable_run(runs: Path) -> None:
    stable, decayed, branched = (train_records(runs / name) for name in ("stable", "decayed", "branched"))
    assert list(branched) == [4, 5, 6]
    for key in ("learning_rate", "loss", "gradient_norm", "tokens"):
        assert [branched[step][key] for step in branched] == [decayed[step][key] for step in branched]
        assert [stable[step][key] for step in (1, 2, 3)] == [decayed[step][key] for step in (1, 2, 3)]
    assert equal(weights(runs / "branched", 6), weights(runs / "decayed", 6))
    rates = [stable[3]["learning_rate"], *(record["learning_rate"] for record in branched.values())]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4 and rates[-1] == 0
    assert json.loads((runs / "branched" / "fork.json").read_text())["changed"] == [
        *("horizon.steps", "schedule.decay")
    ]


def test_what_was_changed_is_written_down(runs: Path) -> None:
    def changed(name: str) -> list[str]:
        return json.loads((runs / name / "fork.json").read_text())["changed"]

    assert changed("same") == []
    assert changed("decay") == ["optim.weight_decay"]
    assert changed("longer") == ["horizon.steps"]
    assert changed("other") == [
        *("data.source.paths", "tokenizer._target_", "tokenizer.path", "tokenizer.training_bytes")
    ]
    assert changed("grandchild") == ["horizon.steps"]
    (event,) = [r for r in read_metrics(runs / "decay" / "metrics.jsonl") if r.get("event") == "fork"]
    assert event["step"] == 3 and event["parent"] == str(runs / "parent")


def test_other_data_is_encoded_with_the_parents_tokenizer(runs: Path) -> None:
    vocabulary = (runs / "parent" / "tokenizer" / "tokenizer.json").read_text()
    assert "ü" not in vocabulary and "ü" in (runs.parent / "other" / "000.txt").read_text()
    for name in ("other", "grandchild"):
        assert (runs / name / "tokenizer" / "tokenizer.json").read_text() == vocabulary
    assert equal(weights(runs / "grandchild", 6), weights(runs / "other", 6))
    assert load(runs / "grandchild" / "config.yaml").data == load(runs / "other" / "config.yaml").data
    prepared = [json.loads((runs / name / "data.json").read_text())["prepared"] for name in FORKS]
    assert len(set(prepared)) == 2  # same text, same folder


def test_a_fork_goes_on_without_its_parent(runs: Path) -> None:
    cases = {"alone": [], "alone-other": FORKS["other"]}
    for name, more in cases.items():
        fork(runs.parent, name, *more)
    (runs / "parent").rename(runs / "gone")
    try:
        for name, more in cases.items():
            before = load(runs / name / "config.yaml")
            fork(runs.parent, name, *more, "horizon.steps=9")
            after = load(runs / name / "config.yaml")
            assert after.tokenizer == before.tokenizer and after.horizon.steps == 9
            for key, value in (("optim.weight_decay", 3), ("fork.step", 6), ("seed", 5)):
                with pytest.raises(ValueError, match=f"^{key}: differs from what .* was started with"):
                    fork(runs.parent, name, *more, f"{key}={value}")
        with pytest.raises(ValueError, match="^tokenizer._target_: differs"):
            fork(runs.parent, "alone", "tokenizer=bytes")
    finally:
        (runs / "gone").rename(runs / "parent")


def test_the_kept_tokenizer_is_put_back_from_the_run(runs: Path) -> None:
    (kept,) = (runs.parent / "prepared").glob(f"{KEPT}*")
    text = kept.read_text()
    kept.unlink()
    fork(runs.parent, "other", *FORKS["other"])
    assert kept.read_text() == text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["fork.run={0}/absent"],
            "fork.run: {0}/absent/config.yaml: no such file; is {0}/absent the directory",
        ),
        (["fork.run={0}/runs/refused"], "fork.run: {0}/runs/refused is this run itself"),
        (
            ["fork.step=4"],
            "fork.step: no checkpoint 4 of {0}/runs/parent (it is not there); choose one of 3, 6",
        ),
        (["model.width=64"], "model.width: differs from that of {0}/runs/parent, which a fork shares; undo"),
        (["model.dropout=0.5"], "model.dropout: differs from that of"),
        (["model.init_from=hf"], "model.init_from: a fork begins with the weights of fork.run; set only one"),
        (["engine.precision=fp32"], "engine.precision: differs from that of"),
        (["sequence_length=16"], "sequence_length: differs from that of"),
        (["global_batch=4"], "global_batch: differs from that of"),
        (["tokenizer=bytes"], "tokenizer._target_: differs from that of"),
        (["horizon.steps=3"], "horizon: ends at step 3, and the fork begins at step 3; set a longer one"),
        (["data.source.paths={0}/none/*.txt"], "data.source.paths: {0}/none/*.txt matches no file"),
    ],
)
def test_what_cannot_be_forked_leaves_no_run_directory(runs: Path, more: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        fork(runs.parent, "refused", *more)
    assert str(caught.value).startswith(message.replace("{0}", str(runs.parent)))
    assert "\n" not in str(caught.value)
    assert not (runs / "refused").exists()


def test_a_damaged_checkpoint_is_refused_or_passed_over(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(runs.parent, folder)
    checkpoints = folder / "runs" / "parent" / "checkpoints"
    (path_of(checkpoints, 6) / STATE).write_text("{}")
    with pytest.raises(ValueError, match=r"^fork.step: no checkpoint 6 of \S+ \(state.json has 2 bytes "):
        fork(folder, "new", "fork.step=6", "horizon.steps=9")
    assert not (folder / "runs" / "new").exists()
    directory = fork(folder, "new", "fork.step=null")
    assert steps(directory / "checkpoints") == [3]
    assert "step-00000006: state.json has 2 bytes" in capsys.readouterr().out
    (path_of(checkpoints, 3) / STATE).unlink()
    with pytest.raises(ValueError, match=r"^fork.run: .* none of its 2 checkpoint\(s\) is whole"):
        fork(folder, "newer", "fork.step=null")
    shutil.rmtree(checkpoints)
    with pytest.raises(ValueError, match="^fork.run: .* has no checkpoint; let it train on"):
        fork(folder, "newer", "fork.step=null")
    assert not (folder / "runs" / "newer").exists()


def test_a_corpus_that_gives_another_vocabulary_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(runs.parent, folder)
    shutil.rmtree(folder / "runs" / "parent")
    with pytest.raises(ValueError, match="^fork.run: .*/config.yaml: no such file"):
        fork(folder, "new")
    begun(folder, "parent", 1, *PARENT)
    for name in ("tokenizer", "checkpoints"):
        shutil.copytree(runs / "parent" / name, folder / "runs" / "parent" / name)
    (folder / "text" / "000.txt").write_text("ß" * 5000)
    with pytest.raises(ValueError, match="^data: the corpus has changed since .*/parent was started, and"):
        fork(folder, "new")
    assert not (folder / "runs" / "new").exists()


def test_an_ordinary_run_does_not_become_a_fork(runs: Path) -> None:
    with pytest.raises(ValueError, match="^fork.run: differs from what .*/parent was started with"):
        fork(runs.parent, "parent", parent="same")
    directory = runs / "junk"
    shutil.copytree(runs / "same" / "checkpoints", directory / "checkpoints")
    with pytest.raises(ValueError, match="^directory: .* holds checkpoints of another run"):
        fork(runs.parent, "junk")


def take(directory: Path) -> None:
    """What begins a fork whose config is frozen."""
    rundir, frozen = RunDir(directory), load(directory / "config.yaml")
    step = fork_step(frozen, rundir)
    if step is not None:
        take_checkpoint(frozen, rundir, step)


def test_a_kill_at_any_moment_of_a_fork(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(start, "take_checkpoint", lambda *arguments: None)
        frozen = fork(runs.parent, "frozen")
    deaths, linked, killed = 0, 0, True
    while killed:
        deaths += 1
        directory = Path(shutil.copytree(frozen, runs / f"killed-{deaths}"))
        killed, checkpoints = killed_at(deaths, partial(take, directory)), directory / "checkpoints"
        linked += bool(steps(checkpoints)) and not (directory / "fork.json").exists()
        take(directory)
        lineage = json.loads((directory / "fork.json").read_text())
        assert lineage == {"parent": str(runs / "parent"), "parent_step": 3, "changed": []}
        assert damage(path_of(checkpoints, 3)) is None
        assert steps(checkpoints) == [3] and (checkpoints / LATEST).read_text() == "step-00000003\n"
        assert not list(checkpoints.glob(".step-*"))
    assert linked and deaths > 8
    assert fork(runs.parent, "frozen") == frozen and steps(frozen / "checkpoints") == [3]


def test_what_cannot_be_linked_is_copied(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(source: Any, target: Any) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", apart)
    directory = fork(runs.parent, "copied")
    assert damage(path_of(directory / "checkpoints", 3)) is None
    one, other = (path_of(runs / run / "checkpoints", 3) / WEIGHTS for run in ("copied", "parent"))
    assert not one.samefile(other)


def test_the_config_is_that_of_any_run_without_a_fork(runs: Path) -> None:
    with pytest.raises(ValueError, match="^fork.step: there is no fork.run"):
        config(runs.parent, "fork.step=3")
