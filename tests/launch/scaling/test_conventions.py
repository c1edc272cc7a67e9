"""One study under every convention: a planted exponent comes out under the one that it was planted under."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from launch.bench_scaling import Design
from launch.scaling import isoflop
from launch.scaling.conventions import CONVENTIONS, LAWS, available, carried, converted, moved, refit
from launch.scaling.table import Points, points

DESIGN = Design()


def study(noise: float = 1e-3, seed: int = 0) -> Points:
    """A law in N without embeddings, laid out at equal FLOP of everything: small sizes are mostly head."""
    budgets = np.geomspace(1e15, 6.4e16, 4).repeat(6)
    body = np.sqrt(budgets / 120) * np.tile(np.geomspace(0.3, 3, 6), 4)
    head = 16_000 * 2 * (body / 100) ** (1 / 3)
    attention = 0.5 * body
    tokens = budgets / (6 * (body + head) + attention)
    random = np.random.default_rng(seed)
    loss = DESIGN.loss(body, tokens) * np.exp(noise * random.standard_normal(len(body)))
    columns = {
        "all_parameters": body + 1.5 * head,
        "body_parameters": body,
        "head_parameters": head,
        "attention_flops_per_token": attention,
    }
    return points(body + 1.5 * head, tokens, loss, flops=budgets, budget=budgets, extra=columns)


def test_n_and_c_under_each_convention() -> None:
    runs = study()
    own = runs.extra
    expected = {
        "with embeddings": own["all_parameters"],
        "without embeddings": own["body_parameters"],
        "with the head": own["body_parameters"] + own["head_parameters"],
        "with attention": own["body_parameters"] * (1 + 0.5 / 6) + own["head_parameters"],
    }
    assert available(runs) == list(CONVENTIONS) == list(expected)
    for convention, sizes in expected.items():
        found = converted(runs, convention)
        assert found.parameters == pytest.approx(sizes)
        assert found.flops == pytest.approx(6 * sizes * runs.tokens)
        assert np.array_equal(found.tokens, runs.tokens) and np.array_equal(found.loss, runs.loss)
    assert converted(runs, "with attention").flops == pytest.approx(runs.budget)


def test_losses_are_carried_along_the_surface() -> None:
    runs = converted(study(noise=0.0), "without embeddings")
    found = carried(runs)
    for budget in np.unique(runs.budget):
        own = runs.budget == budget
        assert np.ptp(np.log(runs.flops[own])) > 0.1
        assert found.flops[own] == pytest.approx(np.exp(np.log(runs.flops[own]).mean()))
    assert found.flops == pytest.approx(6 * found.parameters * found.tokens)
    assert found.loss == pytest.approx(DESIGN.loss(found.parameters, found.tokens), rel=1e-5)
    same = converted(study(), "with attention")
    assert carried(same).loss == pytest.approx(same.loss)


def test_the_planted_exponent_comes_out_under_its_convention_alone() -> None:
    refits = refit(study(), resamples=200)
    assert [(one.law, one.convention) for one in refits] == [
        (law, name) for law in LAWS for name in CONVENTIONS
    ]
    for one in refits:
        assert one.a is not None and one.b is not None and one.a.low is not None and one.a.high is not None
        assert one.a.value + one.b.value == pytest.approx(1, abs=1e-6)
        held = one.a.low <= DESIGN.exponent <= one.a.high
        if one.convention == "without embeddings":
            assert held
        elif one.law != "akima":  # whose intervals are several times as long
            assert not held
    apart = moved(refits)
    assert set(apart) == set(LAWS)
    assert 0.04 < apart["parabola"] < 0.12 and 0.04 < apart["parametric"] < 0.12
    json.dumps([one.as_json() for one in refits], allow_nan=False)


def test_without_carrying_the_exponent_would_be_wrong() -> None:
    found = isoflop.fit(converted(study(noise=0.0), "without embeddings")).parameters.exponent.value
    assert abs(found - DESIGN.exponent) > 0.03
    right = isoflop.fit(carried(converted(study(noise=0.0), "without embeddings"))).parameters.exponent.value
    assert right == pytest.approx(DESIGN.exponent, abs=0.01)


def test_lacking_columns() -> None:
    runs = study()
    fewer = dataclasses.replace(runs, extra={"all_parameters": runs.extra["all_parameters"]})
    assert available(fewer) == ["with embeddings"]
    assert {one.convention for one in refit(fewer, resamples=100)} == {"with embeddings"}
    with pytest.raises(
        ValueError, match="with the head needs the columns body_parameters, head_parameters; add"
    ):
        converted(fewer, "with the head")
    with pytest.raises(ValueError, match="the table has none of the columns all_parameters, attention"):
        refit(dataclasses.replace(runs, extra={}))
    with pytest.raises(ValueError, match="'6N' is none of with embeddings"):
        converted(runs, "6N")


def test_a_law_that_cannot_be_fitted_says_why() -> None:
    runs = study()
    few = refit(runs.select(runs.budget == runs.budget[0]), resamples=100)
    assert all(one.a is None and one.note for one in few if one.law != "parametric")
    assert all("bracketed minima" in str(one.note) for one in few if one.law in isoflop.SIZES)
    assert moved([one for one in few if one.law != "parametric"]) == {}
