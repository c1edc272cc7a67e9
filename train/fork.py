"""A fork: a new run that goes on from another one's checkpoint, under another schedule, data or horizon.

It has the parent's model, vocabulary and batch, so that its weights fit and its steps count on. The
checkpoint's files become links of its own; fork.json, written last, says that the fork needs its parent no
longer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.files import sync_folder, write
from data.tokenizer import load_tokenizer
from train.checkpoint import LATEST, damage, discard, newest_good, path_of, steps
from train.config import RunConfig, at, differences, load, to_container
from train.config import steps as steps_of
from train.rundir import RunDir

EXISTING = "data.tokenizer.Existing"
KEPT = "forked-tokenizer-"  # begins the names of tokenizers that forks took from their parents
SHAPING = ("momentum", "block", "max_precondition_dim", "precondition_frequency")  # what an optimizer keeps
SAME = (
    *("optim._target_", *(f"optim.{key}" for key in SHAPING), "parametrization"),
    *("engine.precision", "sequence_length", "global_batch"),
)
TEXT = ("data", "objective", "packing", "mixture", "curriculum")  # what losses depend on besides the weights
OWN = ("name", "directory", "fork", "model")  # of which `changed` in fork.json says nothing


def fork_config(config: RunConfig, rundir: RunDir) -> RunConfig:
    """The config of a run that is a fork, with the tokenizer that it takes from its parent; else as it is.

    On other data than the parent's that is the parent's, whatever was asked for. A copy of its file lies
    beside the prepared data, under a name that follows from its content: for all such forks, and for good.

    Raises:
        ValueError: fork.run is not another run, or a key differs that a fork shares with its parent.
    """
    if config.fork.run is None:
        return config
    if rundir.lineage():
        return _with_kept_tokenizer(config, rundir)
    parent, before = _parent(config, rundir)
    if config.model.get("init_from"):
        raise ValueError("model.init_from: a fork begins with the weights of fork.run; set only one of them")
    for key in _differing(before, config):
        raise ValueError(
            f"{key}: differs from that of {parent.path}, which a fork shares; undo the change, or start a run"
            " without fork.run"
        )
    if not (parent.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"fork.run: {parent.path} holds no tokenizer; fork a run that has begun to train")
    if _text_of(before) != _text_of(config):
        return replace(config, tokenizer=_kept(parent, before, config))
    if _is_kept(before.tokenizer):
        return _with_kept_tokenizer(config, parent)
    for key in differences("tokenizer", before.tokenizer, config.tokenizer):
        raise ValueError(
            f"{key}: differs from that of {parent.path}, which a fork shares; undo the change, or start a run"
            " without fork.run"
        )
    return config


def fork_step(config: RunConfig, rundir: RunDir) -> int | None:
    """The step of the parent's checkpoint that is to be taken, found whole; None where none is to be.

    Raises:
        ValueError: there is none, it is damaged, or the fork's directory holds checkpoints of its own.
    """
    if config.fork.run is None or rundir.lineage():
        return None
    if taken := steps(rundir.checkpoints):
        if not rundir.config.exists():
            raise ValueError(
                f"directory: {rundir.checkpoints} holds checkpoints of another run; choose another name=…"
            )
        return taken[-1]  # by a start that was killed
    checkpoints, step = RunDir(config.fork.run).checkpoints, config.fork.step
    there = steps(checkpoints)
    if not there:
        raise ValueError(f"fork.run: {config.fork.run} has no checkpoint; let it train on, or fork another")
    if step is None:
        try:
            return newest_good(checkpoints, print)
        except ValueError as error:
            raise ValueError(f"fork.run: {error}") from None
    problem = damage(path_of(checkpoints, step)) if step in there else "it is not there"
    if problem:
        listed = ", ".join(map(str, there))
        raise ValueError(
            f"fork.step: no checkpoint {step} of {config.fork.run} ({problem}); choose one of {listed} (more"
            " are kept with checkpoint.keep and checkpoint.keep_every)"
        )
    return step


def check_fork(config: RunConfig, step: int, total_steps: int, tokenizer: Tokenizer) -> None:
    """The checks of a fork from `step` that need its prepared data.

    Raises:
        ValueError: nothing is left to train, or the data was encoded with another vocabulary.
    """
    assert config.fork.run is not None
    if total_steps <= step:
        raise ValueError(
            f"horizon: ends at step {total_steps}, and the fork begins at step {step}; set a longer one"
        )
    mine, parents = (
        [stage for stage in steps_of(one).stages if stage.step < step]
        for one in (config, load(RunDir(config.fork.run).config))
    )
    if mine != parents:
        raise ValueError(
            f"curriculum: differs before step {step}, where the fork begins, from that of {config.fork.run};"
            " change it from there on only"
        )
    if load_tokenizer(RunDir(config.fork.run).tokenizer).to_str() != tokenizer.to_str():
        raise ValueError(
            f"data: the corpus has changed since {config.fork.run} was started, and gives another tokenizer;"
            " restore it, or name it in another way: the fork then keeps the tokenizer"
        )


def take_checkpoint(config: RunConfig, rundir: RunDir, step: int) -> None:
    """Make the parent's checkpoint of `step` the first of this run, and write down where it comes from.

    A kill at any moment leaves what the same command completes. Raises OSError.
    """
    parent, before = _parent(config, rundir)
    source, target = path_of(parent.checkpoints, step), path_of(rundir.checkpoints, step)
    if not target.exists():
        discard(rundir.checkpoints)
        aside = target.with_name(f".{target.name}")
        aside.mkdir(parents=True)
        for file in source.iterdir():
            _link(file, aside / file.name)
        sync_folder(aside)
        os.rename(aside, target)
        sync_folder(rundir.checkpoints)
    write(rundir.checkpoints / LATEST, target.name + "\n")
    old, new = to_container(before), to_container(config)
    changed = [key for top in old if top not in OWN for key in differences(top, old[top], new[top])]
    lineage = {"parent": config.fork.run, "parent_step": step, "changed": changed}
    write(rundir.path / "fork.json", json.dumps(lineage, indent=1) + "\n")


def begins_on_other_text(rundir: RunDir, step: int) -> bool:
    """Whether a fork begins at `step` on data whose losses are not to be compared with its parent's."""
    lineage = rundir.lineage()
    return (
        lineage is not None
        and lineage["parent_step"] == step
        and any(key.split(".")[0] in TEXT for key in lineage["changed"])
    )


def _parent(config: RunConfig, rundir: RunDir) -> tuple[RunDir, RunConfig]:
    """The run that is forked, and its config. Raises ValueError where it is none, or this very run."""
    assert config.fork.run is not None
    parent = RunDir(config.fork.run)
    if parent.path.resolve() == rundir.path.resolve():
        raise ValueError(f"fork.run: {config.fork.run} is this run itself; choose another name=…")
    try:
        return parent, load(parent.config)
    except (ValueError, OSError) as error:
        raise ValueError(f"fork.run: {error}") from None


def _differing(before: RunConfig, now: RunConfig) -> list[str]:
    """Dotted keys that differ and that a fork has in common with its parent."""
    old, new = to_container(before), to_container(now)
    found = differences("model", old["model"], new["model"])
    return [key for key in SAME if at(old, key) != at(new, key)] + [
        k for k in found if k != "model.init_from"
    ]


def _text_of(config: RunConfig) -> dict[str, Any]:
    """What of the data decides which text there is."""
    return {
        key: value
        for key, value in config.data.items()
        if key not in ("name", "directory", "cache", "cache_bytes")
    }


def _kept(parent: RunDir, before: RunConfig, config: RunConfig) -> dict[str, Any]:
    """A node for the parent's own tokenizer, of which a copy is kept beside the fork's prepared data."""
    source = parent.tokenizer / "tokenizer.json"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    kept = Path(config.data["directory"]) / f"{KEPT}{digest}.json"
    _copy_once(source, kept)
    return {"_target_": EXISTING, "path": str(kept), "special": before.tokenizer.get("special", [])}


def _with_kept_tokenizer(config: RunConfig, run: RunDir) -> RunConfig:
    """The config with the tokenizer of `run`, where that is one that a fork took from its parent."""
    tokenizer = load(run.config).tokenizer
    if not _is_kept(tokenizer):
        return config
    if (run.tokenizer / "tokenizer.json").is_file():
        _copy_once(run.tokenizer / "tokenizer.json", Path(tokenizer["path"]))
    return replace(config, tokenizer=tokenizer)


def _is_kept(tokenizer: dict[str, Any]) -> bool:
    return tokenizer["_target_"] == EXISTING and Path(tokenizer["path"]).name.startswith(KEPT)


def _copy_once(source: Path, target: Path) -> None:
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, source.read_text(encoding="utf-8"))


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy where there cannot be one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())
