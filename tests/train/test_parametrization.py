"""Sizes beside a base: what is multiplied, what is refused, and that it is the base at the base's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.cli import instantiate
from tests.distributed import run_ranks
from tests.tiny import begun, config, corpus
from tests.train.test_run import train_all
from train.optim.groups import Scale, parameter_groups
from train.records import read_metrics
from train.start import begin, build_model, scales

BASE = "parametrization.base={width:32,heads:2}"
WIDE = ["model.width=128", "model.heads=4", "model.layers=2"]
POST_NORM = ["model=bert-tiny", "objective=masked", "model.norm_first=false"]
T5 = ["model.head_width=null"]
FAMILIES = {"demo": "blocks.1", "bert-tiny": "blocks.1", "t5-tiny": "decoder.1", "llama-tiny": "blocks.1"}
NONE = ["++model.feedforward_width=null"]


def built(folder: Path, *more: str) -> tuple[Any, nn.Module, dict[str, Scale]]:
    run = config(folder, *more)
    model = build_model(run, 97)
    return run, model, scales(run, model, 97, instantiate(run.optim, "optim"))


def spread(model: nn.Module, name: str) -> float:
    return model.get_parameter(name).std().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_itself_is_standard(tmp_path: Path, family: str) -> None:
    small = [f"experiment={family}", "model.width=32", "model.heads=2", "model.layers=2", *NONE]
    small += T5 * (family == "t5-tiny")
    if family == "llama-tiny":
        small.append("model.kv_heads=2")
    _, plain, _ = built(tmp_path, *small)
    for choice in ("mup", "completep"):
        base = BASE if choice == "mup" else "parametrization.base={width:32,heads:2,layers:2}"
        _, model, scaled = built(tmp_path, *small, f"parametrization={choice}", base)
        for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(weight, other), name
        assert set(scaled.values()) == {Scale()}
        assert {getattr(module, "multiplier", 1.0) for module in model.modules()} == {1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_as_the_table_has_it(tmp_path: Path, family: str) -> None:
    """At 4 times the base's width, with heads twice as many and twice as wide."""
    own = T5 * (family == "t5-tiny")
    wide = [f"experiment={family}", *WIDE, *NONE, *own] + ["model.kv_heads=2"] * (family == "llama-tiny")
    base = ["parametrization=mup", BASE] + (["+parametrization.base.kv_heads=1"] * (family == "llama-tiny"))
    _, model, scaled = built(tmp_path, *wide, *base)
    sizes = ["model.width=32", "model.heads=2", "model.layers=2", *NONE]
    small = [f"experiment={family}", *sizes, *own] + ["model.kv_heads=1"] * (family == "llama-tiny")
    _, like, _ = built(tmp_path, *small)
    block = FAMILIES[family]
    parts = {"attention.project": 0.5, "feedforward.expand": 0.5, "feedforward.project": 0.5}
    if family == "llama-tiny":  # whose gated width is rounded, and so not 4 times as wide
        del parts["feedforward.project"]
    for part, factor in parts.items():
        name = f"{block}.{part}.weight"
        assert spread(model, name) == pytest.approx(factor * spread(like, name), rel=0.1), name
        assert scaled[name] == Scale(0.25, 4.0, 0.25)
    assert spread(model, "embedding.weight") == pytest.approx(spread(like, "embedding.weight"), rel=0.1)
    assert scaled["embedding.weight"] == Scale(1.0, 1.0, 0.25)
    own, other = model.get_submodule(f"{block}.attention"), like.get_submodule(f"{block}.attention")
    assert own.scale == pytest.approx(other.scale / 2)  # scores, where heads are twice as wide
    factor = getattr(model, "head_factor", 1.0) / getattr(like, "head_factor", 1.0)
    assert model.head.multiplier * factor == pytest.approx(0.25)  # logits


def test_depth_shrinks_branches_and_their_epsilon_alone(tmp_path: Path) -> None:
    deep = ["parametrization=completep", "parametrization.base={width:32,heads:2,layers:2}"]
    _, model, scaled = built(tmp_path, "model.width=32", "model.heads=2", "model.layers=8", *deep)
    _, like, _ = built(tmp_path, "model.width=32", "model.heads=2", "model.layers=2")
    shrunk = {name for name, module in model.named_modules() if getattr(module, "multiplier", 1.0) != 1.0}
    assert shrunk == {f"blocks.{i}.{part}.project" for i in range(8) for part in ("attention", "feedforward")}
    assert model.get_submodule("blocks.7.attention.project").multiplier == 0.25
    name = "blocks.0.attention.project.weight"
    assert spread(model, name) == pytest.approx(spread(like, name), rel=0.1)  # not GPT-2's 1 / sqrt(layers)
    assert scaled[name] == scaled["blocks.7.attention_norm.weight"] == Scale(1.0, 1.0, 0.25)
    assert scaled["embedding.weight"] == scaled["norm.weight"] == Scale()


@pytest.mark.parametrize(("adjust", "rate"), [("match_rms_adamw", 0.5), ("original", 1.0)])
def test_muon_has_a_row_for_each_of_its_scales(tmp_path: Path, adjust: str, rate: float) -> None:
    muon = ["optim=muon", f"optim.adjust={adjust}", "optim.learning_rate=0.01", *WIDE]
    run, model, scaled = built(tmp_path, *muon, "parametrization=mup", BASE)
    rule = instantiate(run.optim, "optim")
    groups = parameter_groups(model, rule, scaled)
    (whole,) = [group for group in groups if group.get("whole")]
    assert whole.get("lr", 0.01) == pytest.approx(0.01 * rate)
    assert whole["weight_decay"] * whole.get("lr", 0.01) == pytest.approx(rule.weight_decay * 0.01)
    assert "eps" not in whole
    (tables,) = [group for group in groups if not group.get("whole") and group["weight_decay"]]
    assert "lr" not in tables and tables["eps"] == pytest.approx(rule.eps / 4)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["optim=sgd"], "parametrization: there is no table for SGD's steps; choose"),
        (["optim=soap"], "parametrization: there is no table for SOAP's steps; choose"),
        (["~parametrization.base.width"], "parametrization.base: has no width; give that of the base"),
        (
            ["+parametrization.base.layers=2"],
            "parametrization.base.layers: muP keeps the depth; leave it out",
        ),
        (["+parametrization.base.decoder_layers=2"], "parametrization.base.decoder_layers: muP keeps the"),
        (
            ["parametrization=completep", "parametrization.base.layers=1", *POST_NORM],
            "model.norm_first: is false, for which there is no rule of depth; set it to true",
        ),
        (["+parametrization.base.wdith=2"], "parametrization.base.wdith: is no key of model; choose from"),
        (["+parametrization.without=[lr]"], "parametrization.without: lr is none of init, rate, decay, eps,"),
        (
            ["parametrization.base.heads=3"],
            "parametrization.base: model.width: 32 is not divisible by heads 3; choose",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, more: list[str], line: str) -> None:
    corpus(tmp_path / "text")
    with pytest.raises(ValueError) as caught:
        begin(config(tmp_path, *WIDE, "parametrization=mup", BASE, *more, f"directory={tmp_path}/run"), 2)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_run_under_it_is_resumed_under_the_same_alone(tmp_path: Path) -> None:
    wide = [*WIDE, "parametrization=mup", BASE, "optim=muon"]
    directory = begun(tmp_path, "wide", 2, *wide)
    run_ranks(train_all, 2, [directory])
    losses = [row["loss"] for row in read_metrics(directory / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"^parametrization.base.width: differs from what"):
        begun(tmp_path, "wide", 2, *wide, "parametrization.base.width=64")
