import time

import numpy as np
import pytest

from data.order import Order


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 64, 65, 1000, 12345])
def test_every_epoch_holds_every_sample_once(samples: int) -> None:
    order = Order(samples, samples, seed=1)
    for epoch in (0, 1, 10**9):
        assert np.array_equal(np.sort(order.step(epoch)), np.arange(samples))


def test_every_epoch_and_seed_has_another_order() -> None:
    orders = [Order(500, 500, seed).step(epoch) for seed in (0, 1, -1, 2**63) for epoch in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == len(orders)
    assert not any(np.array_equal(order, np.arange(500)) for order in orders)


def test_the_sequence_does_not_depend_on_how_it_is_cut_into_steps() -> None:
    whole = Order(37, 120, seed=3).step(0)  # more than three epochs in one step
    parts = np.concatenate([Order(37, 8, seed=3).step(step) for step in range(15)])
    assert np.array_equal(whole, parts)


def test_samples_come_evenly_at_every_position() -> None:
    firsts = np.array([Order(10, 10, seed).step(0) for seed in range(2000)])
    counts = np.array([np.bincount(firsts[:, position], minlength=10) for position in range(10)])
    chi_squared = ((counts - 200) ** 2 / 200).sum(axis=1)  # 9 degrees of freedom each
    assert chi_squared.max() < 33.7  # one in 10,000, among ten


def test_neighbours_do_not_stay_together() -> None:
    order = Order(10_000, 10_000, seed=0).step(0)
    assert (np.diff(order) == 1).sum() < 10  # one is expected
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_any_step_is_reached_at_once() -> None:
    order = Order(10**12 + 7, 512, seed=5)
    seconds = []
    for step in range(10**9, 10**9 + 5):  # the best of some: other processes may hold the machine
        started = time.perf_counter()
        order.step(step)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.01
    far = order.step(10**9)
    assert far.dtype == np.int64 and far.min() >= 0 and far.max() < 10**12 + 7
    assert np.array_equal(far, Order(10**12 + 7, 512, seed=5).step(10**9))


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        Order(0, 1, 0)
    with pytest.raises(ValueError, match="^global_batch: 0"):
        Order(1, 0, 0)
    with pytest.raises(ValueError, match="^step: -1"):
        Order(1, 1, 0).step(-1)
