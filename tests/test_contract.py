"""Every choice below conf/ composes, builds and trains: found by glob, so that none can be forgotten."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data.cli import instantiate
from data.loader import pack
from data.prepare import prepare
from data.tokenizer import SPECIAL
from model.bert import BERT
from model.gpt import GPT
from model.t5 import T5
from tests.distributed import run_ranks
from tests.tiny import ROOT, config, corpus
from train.config import check_world, from_hydra
from train.start import build_model

CONF = ROOT / "conf"
EVERY = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
OTHERS = (
    "hardware",
    "search",
    "study",
)  # groups of other commands than a run's, whose tests have each of them
CHOICES = [(group, choice) for group, choice in EVERY if group not in OTHERS]
USUAL = {"optim": "adamw", "schedule": "cosine", "objective": "causal"}
# Each choice of one group with the usual ones of the others.
TRAINED = [tuple((USUAL | {group: choice}).values()) for group, choice in CHOICES if group in USUAL]
ENGINE = ("engine.threads=1", "engine.precision=fp32")  # in which the smallest change shows
STEPS = 3  # SOAP's first is none
PAIRED = ("next-sentence", "sentence-order")  # objectives with pairs
VOCABULARY = 50304  # where the tokenizer does not say


def names(group: str) -> list[str]:
    return [choice for own, choice in CHOICES if own == group]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def targets(node: Any, key: str = "") -> list[tuple[str, DictConfig]]:
    """The outermost nodes that name a class, with their keys."""
    if not isinstance(node, DictConfig):
        return []
    if "_target_" in node:
        return [(key, node)]
    return [found for name in node for found in targets(node._get_node(name), f"{key}.{name}".strip("."))]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands where a choice asks for a path."""
    path = tmp_path_factory.mktemp("contract") / "file.json"
    path.write_text("{}")
    return path


def test_every_yaml_is_found() -> None:
    assert set(CONF.rglob("*.yaml")) == {
        *(CONF / group / f"{choice}.yaml" for group, choice in EVERY),
        *CONF.glob("*.yaml"),
    }
    assert {
        "model",
        "data",
        "tokenizer",
        "objective",
        "optim",
        "schedule",
        "engine",
        "track",
        "experiment",
    } <= {group for group, _ in CHOICES}
    assert TRAINED


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_command_composes(path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose(path.stem)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_its_classes_take_it(group: str, choice: str, file: Path) -> None:
    whole = composed(f"{group}={choice}")
    for key in OmegaConf.missing_keys(whole):
        OmegaConf.update(whole, key, str(file))
    config = from_hydra(whole)
    part = whole if group == "experiment" else whole[group]
    for key, node in targets(part, "" if group == "experiment" else group):
        if key == "model":
            continue
        assert instantiate(node, key) is not None
    vocabulary = config.tokenizer.get("vocabulary_size", VOCABULARY)
    if group in ("model", "experiment"):
        with torch.device("meta"):
            model = build_model(config, vocabulary)
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("choice", names("experiment"))
def test_every_experiment_divides_over_its_ranks(choice: str) -> None:
    config = from_hydra(composed(f"experiment={choice}"))
    assert config.name == choice
    check_world(config, config.engine.ranks or 1)
    if config.engine.ranks is None and config.micro_batch:
        check_world(config, 8)


def fitting(objective: Any) -> Any:
    """A tiny model of a family that the objective trains."""
    sizes: dict[str, Any] = {
        "vocabulary_size": 512,
        "sequence_length": 64,
        "layers": 1,
        "width": 32,
        "heads": 2,
    }
    (family,) = objective.families
    models = {"decoder": GPT, "encoder": partial(BERT, pair_head=True), "encoder-decoder": T5}
    torch.manual_seed(0)
    return models[family](**sizes)


def some_steps(folder: str) -> list[tuple[list[float], list[str]]]:
    """Losses of some steps of each way to train, and the weights that they left as they were."""
    from train.engine import Engine, start_world
    from train.optim.groups import parameter_groups

    world = start_world()
    corpus(Path(folder) / "text")
    results = []
    for optim, schedule, objective in TRAINED:
        choices = (f"optim={optim}", f"schedule={schedule}", f"objective={objective}", "tokenizer=bpe")
        special = f"tokenizer.special=[{','.join(SPECIAL)}]"
        vocabulary = "tokenizer.vocabulary_size=512"
        run = config(Path(folder), *choices, special, vocabulary, "sequence_length=64", *ENGINE)
        trained, rate = instantiate(run.objective, "objective"), instantiate(run.schedule, "schedule")
        prepared = prepare(OmegaConf.create(run.data), OmegaConf.create(run.tokenizer), progress=False)
        collate = trained.collator(prepared, run.sequence_length, isolate=False)
        packing = pack(trained.training_stream(prepared), "chunk", collate, training=True)
        batch = collate([packing.sample(index) for index in range(8)])
        model = fitting(trained)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        rule = instantiate(run.optim, "optim")
        engine = Engine(run, model, trained, rule, parameter_groups(model, rule), world)
        losses = []
        for step in range(STEPS):
            engine.set_learning_rate(rate(step, STEPS))
            result = engine.train_step(step, [batch])
            losses.append(float(result.loss_sum) / result.count)
        after = engine.snapshot(aside=True)[1] or {}
        still = [
            name for name in before if not after[name].isfinite().all() or after[name].equal(before[name])
        ]
        results.append((losses, still))
    return results


def test_every_way_to_train_takes_some_steps(tmp_path: Path) -> None:
    (results,) = run_ranks(some_steps, 1, str(tmp_path))
    for way, (losses, still) in zip(TRAINED, results, strict=True):
        assert all(0 < loss < 100 for loss in losses), way
        assert losses[-1] < losses[0], way
        # What tells a pair's two texts apart and in order is only trained where there are pairs.
        untrained = ("pooler", "pair_head", "segments") if not way[2].endswith(PAIRED) else ()
        assert not [name for name in still if not name.startswith(untrained)], way
