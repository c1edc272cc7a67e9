"""The minimum over training curves: a planted law is found, and only between smaller and larger sizes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.bench_scaling import Design
from launch.scaling.frontier import Run, curves, envelope, fit, read

DESIGN = Design()


def planted(count: int = 12, noise: float = 1e-3, seed: int = 0) -> list[Run]:
    """Curves of sizes that are best from 1e16 to 1e20 FLOP, each up to 1e19 FLOP. noise: a run's own."""
    random = np.random.default_rng(seed)
    runs = []
    for index, size in enumerate(DESIGN.best(np.geomspace(1e16, 1e20, count))):
        tokens = np.geomspace(1e15, 1e19, 80) / 6 / size
        loss = DESIGN.loss(size, tokens) * np.exp(noise * random.standard_normal())
        runs.append(Run(f"size {index}", float(size), tokens, 6 * size * tokens, loss))
    return runs


def test_planted_exponents_are_found() -> None:
    found = fit(planted(count=40, noise=0.0), draws=20)
    assert found.size.exponent.value == pytest.approx(DESIGN.exponent, abs=0.01)
    assert found.length.exponent.value == pytest.approx(1 - DESIGN.exponent, abs=0.01)
    assert found.least.exponent.value == pytest.approx(DESIGN.alpha * DESIGN.exponent, rel=0.05)
    assert found.least.floor.value == pytest.approx(DESIGN.floor, rel=0.02)
    assert 6 * found.parameters * found.tokens == pytest.approx(found.flops)
    json.dumps(found.as_json(), allow_nan=False)


def test_planted_exponents_lie_in_their_intervals() -> None:
    held = 0
    for seed in range(10):
        exponent = fit(planted(seed=seed), draws=100, seed=seed).size.exponent
        assert exponent.low is not None and exponent.high is not None
        held += exponent.low <= DESIGN.exponent <= exponent.high
    assert held >= 9


def test_the_envelope_is_the_lowest_curve_between_others() -> None:
    nan = np.nan
    loss = np.array([[3.0, 2.9, 2.8, nan], [3.1, 2.8, 2.5, 2.4], [3.5, 3.0, 2.6, 2.3]])
    tokens = np.log(np.arange(1.0, 13.0).reshape(3, 4))
    found, there = envelope(np.array([10.0, 20.0, 40.0]), np.stack([tokens, loss]))
    # The smallest is lowest at first and the largest last; in between the middle one has both beside it.
    assert there.tolist() == [False, True, True, False]
    assert found[0, there].tolist() == [20, 20]
    assert found[1, there] == pytest.approx([6, 7])
    assert found[2, there].tolist() == [2.8, 2.5]


def test_few_runs_have_no_interval() -> None:
    found = fit(planted(count=7))
    assert found.size.exponent.low is None
    assert found.notes == ("no intervals: 7 curves, and resamples of them need 8",)


def test_an_envelope_of_too_few_sizes() -> None:
    with pytest.raises(ValueError, match="2 sizes are the best somewhere between smaller and larger ones"):
        fit(planted(count=4, noise=0.0))


def rows(runs: list[Run], **more: Any) -> list[dict[str, Any]]:
    return [
        {"name": run.name, "parameters": run.parameters, "tokens": d, "flops": c, "loss": loss} | more
        for run in runs
        for d, c, loss in zip(run.tokens, run.flops, run.loss, strict=True)
    ]


def test_curves_are_read_by_kind_and_in_order(tmp_path: Path) -> None:
    runs = planted(count=4)
    table = rows(runs, kind="train")[::-1] + rows(runs[:3], kind="eval")
    path = tmp_path / "curves.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    found = {run.name: run for run in read(path)}
    assert len(found) == 4 and len(read(path, "eval")) == 3
    for run in runs:
        assert found[run.name].loss == pytest.approx(run.loss)
        assert found[run.name].parameters == run.parameters
    path.write_text("name,parameters,tokens,loss\na,1,2,3\n")
    with pytest.raises(ValueError, match=r"curves\.csv: curves: row 1 has no flops; give them"):
        read(path)


def test_rows_that_are_no_curves() -> None:
    table = rows(planted(count=3))
    with pytest.raises(ValueError, match="row 2 holds something else than numbers"):
        curves([table[0], table[1] | {"loss": "high"}])
    with pytest.raises(ValueError, match="2 runs have two losses or more, and an envelope needs 3"):
        curves([row | {"loss": np.nan} if row["name"] == "size 1" else row for row in table])
