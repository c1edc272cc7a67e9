"""Every optimizer is right under ZeRO, and the certificate finds those that are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from launch import certify
from launch.certify import ACCUMULATIONS, CLIPPINGS, RANKS, STAGES, Result
from tests.distributed import run_ranks
from tests.train.test_run import hurry


def certificates(names: list[str]) -> list[Result]:
    from train.engine import start_world

    hurry()
    return certify.certificate(names, start_world())


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [result for ranks in RANKS for result in run_ranks(certificates, ranks, certify.rules())[0]]


@pytest.mark.parametrize("rule", certify.rules())
def test_every_rule_is_certified_in_every_setting(results: list[Result], rule: str) -> None:
    mine = [result for result in results if result.rule == rule]
    settings = {(r.zero_stage, r.accumulation, r.clipping, r.ranks) for r in mine}
    assert len(settings) == len(mine) == len(STAGES) * len(ACCUMULATIONS) * len(CLIPPINGS) * len(RANKS)
    assert not [result for result in mine if not result.certified]


def test_the_rules_step_what_is_theirs(results: list[Result]) -> None:
    touched = {result.rule: (result.whole, result.elementwise) for result in results}
    matrices, parameters = 4 * 2, 15  # in blocks, of all: qkv, project, expand, project of two layers
    assert touched["muon"] == (matrices, parameters - matrices)
    for rule in ("soap", "shampoo", "adafactor"):
        assert touched[rule] == (parameters, 0)
    for rule in ("adamw", "lion", "sgd", "schedule-free"):
        assert touched[rule] == (0, parameters)


def test_the_table_has_a_row_for_each_rule(results: list[Result]) -> None:
    rows = certify.table(results).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == certify.rules()
    assert all(re.fullmatch(r"(\| [^|]+ )+\|", row) for row in rows[:1] + rows[2:])
    wrong = [Result(**{**vars(result), "error": 1.0}) for result in results]
    assert certify.table(wrong).count("FAILED") == len(certify.rules()) * len(STAGES)


@contextmanager
def wrong_tag() -> Iterator[None]:
    """The engine is told to orthogonalize embeddings, too, as rules that go by dimensions do."""
    from train.optim.muon import Muon

    groups = certify.parameter_groups

    class Tagged(Muon):
        def takes_whole(self, role: str) -> bool:
            return role in ("hidden", "embedding")

    def tagged(rule: Any, *arguments: Any) -> Any:
        made = Tagged.__new__(Tagged)
        made.__dict__.update(vars(rule))
        with mock.patch.object(certify, "parameter_groups", lambda model, _: groups(model, made)):
            return engine(rule, *arguments)

    engine = certify.engine
    with mock.patch.object(certify, "engine", tagged):
        yield


@contextmanager
def clipped_after() -> Iterator[None]:
    """The update is clipped, and not the gradient."""
    from train.whole import Whole

    def update(self: Any, group: Any, names: Any, weights: torch.Tensor, gradients: torch.Tensor) -> None:
        before = weights.clone()
        inner(self, group, names, weights, gradients)
        way = weights - before
        weights.copy_(before + way * min(1.0, certify.CLIPPING * group["lr"] / way.norm().item()))

    inner = Whole._update
    with mock.patch.object(Whole, "_update", update):
        yield


@contextmanager
def each_micro_batch() -> Iterator[None]:
    """The rule is stepped twice a step."""
    from train.whole import Whole

    def step(self: Any, group: Any) -> None:
        inner(self, group)
        inner(self, group)

    inner = Whole.step
    with mock.patch.object(Whole, "step", step):
        yield


@contextmanager
def only_its_share() -> Iterator[None]:
    """The rule sees this rank's share of a matrix, and zeros."""
    from train.whole import Whole

    with mock.patch("train.whole.dist.reduce", lambda *arguments: None):
        assert Whole
        yield


@contextmanager
def no_decay() -> Iterator[None]:
    """Matrices do not decay in the engine."""
    from train.whole import Whole

    def update(self: Any, group: Any, *others: Any) -> None:
        self._groups[group["names"][0]]["weight_decay"] = 0.0
        inner(self, group, *others)

    inner = Whole._update
    with mock.patch.object(Whole, "_update", update):
        yield


MISTAKES: list[Callable[[], Any]] = [wrong_tag, clipped_after, each_micro_batch, only_its_share, no_decay]


def with_mistakes() -> dict[str, list[Result]]:
    from train.engine import start_world

    hurry()
    found = {}
    for mistake in MISTAKES:
        with mistake():
            found[mistake.__name__] = certify.certificate(["muon"], start_world())
    return found


def test_a_mistake_is_found() -> None:
    found = run_ranks(with_mistakes, 2)[0]
    for name in ("wrong_tag", "each_micro_batch"):
        assert not any(result.certified for result in found[name]), name
        assert all(result.missed for result in found[name]), name
    for name in ("clipped_after", "no_decay"):
        assert not any(result.certified for result in found[name]), name
    shared = [result for result in found["only_its_share"] if result.zero_stage > 0]
    assert shared and not any(result.certified for result in shared)


def scaled() -> list[Result]:
    """Under a parametrization: some parameters have a learning rate, a decay and an epsilon of their own."""
    from train.engine import start_world
    from train.optim.groups import Scale, parameter_groups

    def groups(model: Any, rule: Any) -> Any:
        names = (name for name, _ in model.named_parameters())
        return parameter_groups(model, rule, {name: Scale(0.3, 2.0, 50.0) for name in names if ".0." in name})

    hurry()
    with mock.patch.object(certify, "parameter_groups", groups):
        return certify.certificate(["adamw", "muon", "lion"], start_world())


def test_the_engine_keeps_to_the_rates_of_each_group() -> None:
    found = run_ranks(scaled, 2)[0]
    assert len(found) == 3 * len(STAGES) * len(ACCUMULATIONS) * len(CLIPPINGS)
    assert not [result for result in found if not result.certified]


def test_a_rule_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("sys.argv", ["certify", "--rules", "adamw", "sofia"]), pytest.raises(SystemExit):
        certify.main()
    assert capsys.readouterr().err.startswith(
        "error: --rules: there is no sofia; choose from adabound, adafactor,"
    )
