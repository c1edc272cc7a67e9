"""The objective of the parametric laws, its derivatives, and the minimiser."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import huber, logsumexp

from launch.scaling.objective import DELTA, Objective, minimise

AT = np.array([6.0, 7.5, 0.6, 0.34, 0.37])


def sizes(runs: int = 30, noise: float = 2e-3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    x, y = random.uniform(17, 23, runs), random.uniform(20, 26, runs)
    clean = logsumexp([AT[0] - AT[3] * x, AT[1] - AT[4] * y, np.full(runs, AT[2])], axis=0)
    return x, y, clean + noise * random.standard_normal(runs)


def test_the_sum_of_huber_losses() -> None:
    x, y, log_loss = sizes()
    predicted = logsumexp([AT[0] - AT[3] * x, AT[1] - AT[4] * y, np.full(len(x), AT[2])], axis=0)
    objective = Objective((x, y, log_loss))
    found = objective.values(objective.to_centred(AT[None]), np.zeros(1, dtype=int))
    assert found[0] == pytest.approx(huber(DELTA, predicted - log_loss).sum(), rel=1e-9)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("noise", [1e-4, 2e-2])  # within delta, where Huber's loss bends, and beyond it
def test_derivatives_against_finite_differences(centred: bool, noise: float) -> None:
    objective, row = Objective(sizes(noise=noise), centred=centred), np.zeros(1, dtype=int)
    at = objective.to_centred(AT) + [1e-5, -1e-5, 2e-5, 1e-6, -1e-6]
    value, gradient, hessian = (part[0] for part in objective.derivatives(at[None], row))
    assert value == objective.values(at[None], row)[0]
    again = objective.gradients(at[None], row)
    assert again[0][0] == value and np.allclose(again[1][0], gradient, rtol=1e-12)
    step = 1e-8
    for i, unit in enumerate(np.eye(5)):
        ends = [objective.derivatives((at + sign * step * unit)[None], row) for sign in (1, -1)]
        slope, bend = ((ends[0][part][0] - ends[1][part][0]) / (2 * step) for part in (0, 1))
        assert slope == pytest.approx(gradient[i], abs=1e-6 * np.linalg.norm(gradient))
        assert np.allclose(bend, hessian[i], atol=1e-5 * np.abs(hessian).max())


def test_weights_are_repeated_runs() -> None:
    data = sizes()
    counts = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=4).astype(float)
    weighted = Objective(data, counts)
    at = np.repeat(weighted.to_centred(AT)[None], 4, axis=0)
    of_all = weighted.derivatives(at, np.arange(4))
    for row, drawn in enumerate(counts.astype(int)):
        repeated = Objective(tuple(np.repeat(column, drawn) for column in data), centred=False)  # type: ignore
        assert of_all[0][row] == pytest.approx(repeated.values(AT[None], np.zeros(1, dtype=int))[0])
    one = weighted.derivatives(at[2:3], np.array([2]))
    assert all(np.allclose(part[2], own[0]) for part, own in zip(of_all, one, strict=True))


def test_raw_and_centred_are_reverse_and_agree() -> None:
    data = sizes()
    centred, raw = Objective(data), Objective(data, centred=False)
    row = np.zeros(1, dtype=int)
    assert np.allclose(centred.to_raw(centred.to_centred(AT)), AT, rtol=1e-14)
    assert centred.values(centred.to_centred(AT[None]), row) == pytest.approx(raw.values(AT[None], row))


def test_minima_of_many_starts_are_one() -> None:
    objective = Objective(sizes(60))
    random = np.random.default_rng(1)
    starts = objective.to_centred(AT) + 0.3 * random.standard_normal((50, 5))
    at, values = minimise(objective, starts)
    assert np.ptp(values) < 1e-10 * values.min()
    gradient = objective.gradients(at, np.zeros(len(at), dtype=int))[1]
    assert np.abs(gradient).max() < 1e-9
    nearby = at[:1] + 1e-3 * random.standard_normal((1000, 5))
    assert (objective.values(nearby, np.zeros(1000, dtype=int)) > values[0]).all()


def test_what_is_not_free_stays() -> None:
    objective = Objective(sizes())
    start = objective.to_centred(AT)[None] + 0.05
    at, values = minimise(objective, start, np.eye(5)[:, :3])
    assert np.array_equal(at[0, 3:], start[0, 3:])
    assert minimise(objective, start)[1][0] < values[0] < objective.values(start, np.zeros(1, dtype=int))[0]
