import time

import numpy as np
import pytest

from data.order import Order, Sequential


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


@pytest.mark.parametrize(
    ("samples", "batch", "seed", "step", "expected"),
    [
        (1000, 8, 0, 0, [404, 729, 623, 343, 661, 703, 586, 465]),
        (1000, 8, 0, 125, [229, 773, 709, 822, 734, 922, 181, 868]),
        (12345, 6, -7, 3, [8669, 5743, 6145, 11977, 9780, 10246]),
        (10**12 + 7, 3, 2**63, 5 * 10**9 // 3 + 1, [238222610530, 853305467397, 877756625982]),
        (2, 5, 1, 4, [0, 1, 0, 1, 0]),
    ],
)
def test_the_order_of_a_run_that_goes_on_stays_what_it_was(
    samples: int, batch: int, seed: int, step: int, expected: list[int]
) -> None:
    assert Order(samples, batch, seed).step(step).tolist() == expected


class Growing:
    """Step s has s + 1 samples."""

    def span(self, step: int) -> tuple[int, int]:
        return step * (step + 1) // 2, step + 1

    def rows(self, step: int) -> int:
        return 1

    def check(self, micro_batch: int, world_size: int) -> None:
        pass


@pytest.mark.parametrize("block", [None, 5])
def test_steps_may_differ_in_size(block: int | None) -> None:
    order, whole = Order(37, Growing(), 3, block), Order(37, 37, 3, block)
    steps = range(16)  # 136 samples, more than three epochs
    parts = np.concatenate([order.step(step) for step in steps])
    assert [len(order.step(step)) for step in steps] == [step + 1 for step in steps]
    assert np.array_equal(parts, np.concatenate([whole.step(epoch) for epoch in range(4)])[:136])
    epochs = np.concatenate([order.epochs(step) for step in steps])
    assert epochs.tolist() == [position // 37 for position in range(136)]


@pytest.mark.parametrize(
    ("samples", "block"), [(1, 1), (2, 1), (12, 3), (13, 3), (100, 7), (10, 10), (10, 99)]
)
def test_an_epoch_comes_block_by_block(samples: int, block: int) -> None:
    order = Order(samples, samples, seed=2, block=block)
    for epoch in (0, 1, 10**9):
        ids = order.step(epoch)
        assert np.array_equal(np.sort(ids), np.arange(samples))
        of = ids // block
        assert (np.diff(of) != 0).sum() == -(-samples // block) - 1  # each block in one stretch
        assert order.epochs(epoch).tolist() == [epoch] * samples


def test_blocks_and_what_is_in_them_come_in_another_order_each_epoch() -> None:
    order = Order(1003, 1003, seed=0, block=50)
    epochs = [order.step(epoch) for epoch in range(40)]
    of = [ids[np.flatnonzero(np.diff(ids // 50, prepend=-1))] // 50 for ids in epochs]
    assert len({tuple(blocks) for blocks in of}) == 40
    assert len({int(np.argmax(blocks == 20)) for blocks in of}) > 10  # the short one is at any place
    within = {tuple(ids[ids // 50 == 3] % 50) for ids in epochs}
    within |= {tuple(ids[ids // 50 == 4] % 50) for ids in epochs}
    assert len(within) == 80


def test_samples_come_evenly_at_every_position_of_a_block() -> None:
    orders = np.array([Order(12, 12, seed, block=4).step(0) for seed in range(3000)])
    counts = np.array([np.bincount(orders[:, position], minlength=12) for position in range(12)])
    chi_squared = ((counts - 250) ** 2 / 250).sum(axis=1)  # 11 degrees of freedom each
    assert chi_squared.max() < 37.4  # one in 10,000, among twelve


def test_a_sequential_order_counts_up() -> None:
    assert Sequential(4).step(3).tolist() == [12, 13, 14, 15]
    assert Sequential(4).epochs(3).tolist() == [0] * 4
    assert Sequential(Growing()).step(3).tolist() == [6, 7, 8, 9]


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        Order(0, 1, 0)
    with pytest.raises(ValueError, match="^global_batch: 0"):
        Order(1, 0, 0)
    with pytest.raises(ValueError, match="^step: -1"):
        Order(1, 1, 0).step(-1)
    with pytest.raises(ValueError, match="^block: 0 samples is not positive"):
        Order(1, 1, 0, block=0)
