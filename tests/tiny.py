"""The smallest real run: a corpus, a config and a begun run directory."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from train.checkpoint import WEIGHTS, path_of, seal
from train.config import RunConfig, from_hydra
from train.files import entry_of
from train.start import begin

ROOT = Path(__file__).resolve().parent.parent


def corpus(folder: Path, documents: int = 40) -> Path:
    """Text files with some regularity to learn, and in each the name of a class, and Chinese."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        lines = [f"item {index * 7 % 10} follows item {(index + line) % 10}, é" for line in range(20)]
        lines.append("raise ValueError('李明在北京大学学习')")
        (folder / f"{index:03d}.txt").write_text("\n".join(lines))
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    """Command-line overrides of a run of a few seconds in `folder`, on the corpus in folder/text.

    more: further ones; an experiment among them brings its own tokenizer and model.
    """
    own = [] if any(one.startswith("experiment=") for one in more) else ["tokenizer=bytes", "model=gpt-nano"]
    return [
        *own,
        *("data=text", f"data.source.paths={folder}/text/*.txt", f"data.directory={folder}/prepared"),
        *("track=disabled", "data.validation.share=0.2"),
        *(
            "sequence_length=32",
            "global_batch=8",
            "horizon.steps=6",
            "horizon.epochs=null",
            "schedule.warmup=1",
        ),
        *("log.every=1", "evaluation.every=3", "checkpoint.every=3", "optim.learning_rate=3e-3"),
        *more,
    ]


def config(folder: Path, *more: str) -> RunConfig:
    """The config of such a run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(compose("config", overrides=overrides(folder, *more)))


def begun(folder: Path, name: str, world_size: int, *more: str) -> Path:
    """A begun run directory: the config is frozen, the data prepared, no step taken."""
    if not (folder / "text").exists():
        corpus(folder / "text")
    directory = folder / "runs" / name
    begin(config(folder, f"directory={directory}", f"name={name}", *more), world_size)
    return directory


def write_checkpoint(directory: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    """A checkpoint of weights alone, for the commands that read no more."""
    folder = path_of(directory, step)
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS)
    seal(folder, step, {WEIGHTS: entry_of(folder / WEIGHTS)})
