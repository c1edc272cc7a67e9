"""What happens once before there are ranks: every check, the data, the frozen config."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf
from torch import nn

from data.cli import instantiate
from data.loader import training_samples
from data.prepare import prepare
from data.shards import TokenStream
from train.config import RunConfig, check_device, check_world
from train.rundir import RunDir


def begin(config: RunConfig, world_size: int) -> RunDir:
    """Check the config, prepare its data and freeze both in the run directory, for all ranks to work from.

    Returns the run directory, locked for as long as this process, or one that inherits the lock, lives.

    Raises:
        ValueError: one line on what is wrong with the config, the data or the run directory.
    """
    check_world(config, world_size)
    check_device(config)
    for key in ("objective", "optim", "schedule"):
        instantiate(getattr(config, key), key)
    with torch.device("meta"):
        build_model(config, vocabulary_size=1)  # what is wrong with any vocabulary shows before data is made
    rundir = RunDir(config.directory)
    with rundir.beginning():
        rundir.check_resume(config, world_size)
        prepared = prepare(OmegaConf.create(config.data), OmegaConf.create(config.tokenizer))
        train = TokenStream(prepared, "train")
        training_samples(train, config.sequence_length)
        with torch.device("meta"):
            build_model(config, train.vocabulary_size)
        rundir.freeze(config, prepared)
    return rundir


def build_model(config: RunConfig, vocabulary_size: int) -> nn.Module:
    """The config's model on the current default device, seeded; its vocabulary is the tokenizer's unless set.

    Raises:
        ValueError: an argument that the model refuses, or a vocabulary smaller than the tokenizer's.
    """
    node = dict(config.model)
    node["vocabulary_size"] = node.get("vocabulary_size") or vocabulary_size
    if isinstance(node["vocabulary_size"], int) and node["vocabulary_size"] < vocabulary_size:
        raise ValueError(
            f"model.vocabulary_size: {node['vocabulary_size']} is smaller than the tokenizer's"
            f" {vocabulary_size}; set at least that, or null for the tokenizer's"
        )
    torch.manual_seed(config.seed)
    return instantiate(node, "model")
