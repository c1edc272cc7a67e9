"""What happens once before there are ranks: every check, the data, the frozen config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from torch import nn

from data.cli import instantiate
from data.prepare import prepare
from data.shards import read_manifest
from data.tokenizer import load_tokenizer
from train.config import RunConfig, check_device, check_world
from train.eval.sample import encoded_prompt
from train.fork import check_fork, fork_config, fork_step, take_checkpoint
from train.optim.base import Rule
from train.optim.groups import Scale
from train.parametrization import Standard
from train.pretrained import check_pretrained
from train.rundir import RunDir
from train.supply import check_reached, supply


def begin(config: RunConfig, world_size: int) -> RunDir:
    """Check the config, prepare its data and freeze both in the run directory, for all ranks to work from.

    Returns the run directory, locked for as long as this process, or one that inherits the lock, lives.

    Raises:
        ValueError: one line on what is wrong with the config, the data or the run directory.
    """
    check_world(config, world_size)
    check_device(config)
    keys = ("objective", "optim", "schedule")
    objective, rule, schedule = (instantiate(getattr(config, key), key) for key in keys)
    with torch.device("meta"):  # what is wrong with any vocabulary shows before data is made
        model = build_model(config, vocabulary_size=1)
        objective.check_model(model)
        scales(config, model, 1, rule)
    rundir = RunDir(config.directory)
    with rundir.beginning():
        config = fork_config(config, rundir)
        rundir.check_resume(config)
        step = fork_step(config, rundir)
        prepared = prepare(OmegaConf.create(config.data), OmegaConf.create(config.tokenizer))
        planned = supply(config, objective, prepared)
        if not rundir.config.exists():  # of a run that has begun, the horizon may be drawn in
            check_reached(config, objective, schedule, planned.total_steps)
        inputs = objective.inputs(prepared)
        with torch.device("meta"):
            model = build_model(config, read_manifest(prepared)["vocabulary_size"])
        tokenizer = load_tokenizer(prepared / "tokenizer")
        if config.model.get("init_from") and not any(rundir.checkpoints.glob("step-*")):
            check_pretrained(model, Path(config.model["init_from"]), tokenizer)
        if config.evaluation.prompt is not None:
            check_prompt(model, tokenizer, config.evaluation.prompt)
        if step is not None:
            check_fork(config, step, planned.total_steps, tokenizer)
        rundir.freeze(config, prepared, inputs)
        if step is not None:
            take_checkpoint(config, rundir, step)
    return rundir


def check_prompt(model: nn.Module, tokenizer: Tokenizer, prompt: str) -> None:
    """Raises ValueError where the prompt is one that the model cannot answer: at the first evaluation, what
    was trained until then would be lost."""
    try:
        encoded_prompt(model, tokenizer, prompt)
    except ValueError as error:
        raise ValueError(f"evaluation.{error}") from None


def build_model(config: RunConfig, vocabulary_size: int) -> nn.Module:
    """The config's model on the current default device, seeded; its vocabulary is the tokenizer's unless set.

    Raises:
        ValueError: an argument that the model refuses, or a vocabulary smaller than the tokenizer's.
    """
    node = _model_node(config, vocabulary_size)
    torch.manual_seed(config.seed)
    model = instantiate(node, "model")
    parametrization = parametrization_of(config)
    if parametrization.base:
        base = _base(parametrization, node)
        check_base(config, node, model, base)
        parametrization.shape(model, base)
    return model


def parametrization_of(config: RunConfig) -> Standard:
    """Raises ValueError where its settings make no sense."""
    return instantiate(config.parametrization, "parametrization") if config.parametrization else Standard()


def scales(config: RunConfig, model: nn.Module, vocabulary_size: int, rule: Rule) -> dict[str, Scale]:
    """What the config's parametrization makes of a rule's hyperparameters for its model, by parameter.

    Raises:
        ValueError: the two do not go together.
    """
    parametrization = parametrization_of(config)
    if not parametrization.base:
        return {}
    return parametrization.scales(model, _base(parametrization, _model_node(config, vocabulary_size)), rule)


def check_base(config: RunConfig, node: dict[str, Any], model: nn.Module, base: nn.Module) -> None:
    """Raises ValueError where a model cannot be parametrized by another."""
    if getattr(model, "layers", None) != getattr(base, "layers", None):
        owners = [own for module in model.modules() for own in (module, getattr(module, "shape", module))]
        if any(getattr(own, "norm_first", True) is False for own in owners):
            raise ValueError(
                "model.norm_first: is false, for which there is no rule of depth; set it to true"
            )
        stacks: list[Any] = [
            [getattr(own, "decoder_layers", own.layers), own.layers] for own in (model, base)
        ]
        if stacks[0][0] * stacks[1][1] != stacks[1][0] * stacks[0][1]:
            raise ValueError(
                "parametrization.base.decoder_layers: must be as much fewer than the model's as the encoder's"
            )
    if config.model.get("init_from"):
        raise ValueError("model.init_from: such weights have no base size; choose parametrization=standard")
    if node.get("scaled_embedding"):
        raise ValueError("model.scaled_embedding: has a table of its own; choose parametrization=standard")


def _base(parametrization: Standard, node: dict[str, Any]) -> nn.Module:
    """The base model, without memory."""
    for key in parametrization.base:
        if key not in node:
            raise ValueError(f"parametrization.base.{key}: is no key of model; choose from {', '.join(node)}")
    with torch.device("meta"):
        return instantiate({**node, **parametrization.base}, "parametrization.base")


def _model_node(config: RunConfig, vocabulary_size: int) -> dict[str, Any]:
    node = {key: value for key, value in config.model.items() if key != "init_from"}
    node["vocabulary_size"] = node.get("vocabulary_size") or vocabulary_size
    if isinstance(node["vocabulary_size"], int) and node["vocabulary_size"] < vocabulary_size:
        raise ValueError(
            f"model.vocabulary_size: {node['vocabulary_size']} is smaller than the tokenizer's"
            f" {vocabulary_size}; set at least that, or null for the tokenizer's"
        )
    return node
