import math
from fractions import Fraction

import numpy as np
import pytest

from data.curriculum import Curriculum
from data.deal import Deal
from data.mix import Mixture, weights_of

SIZES = {"web": 1000, "code": 100, "books": 37}
WEIGHTS = {"web": 0.5, "code": 0.3, "books": 0.2}
PROPORTIONS = (
    [1],
    [1, 1],
    [5, 3, 2],
    [1, 1, 1, 1, 1, 1, 1],
    [500] + [5] * 100,  # by the nearest time of each part alone, the first would be 25 draws ahead of it
    [1, 10, 100, 1000],
    [1021, 1012, 1025, 2040, 3117, 5075, 8190, 13379, 28],  # Fibonacci's, and a light one: hard for the tree
    [round(1000 * np.random.default_rng(seed).random()) + 1 for seed in range(12)],
    [10**17 + 1, 3 * 10**17, 7],  # beyond what int64 multiplies
)


def mixture(sizes: dict = SIZES, batch: int = 16, seed: int = 3, **settings: object) -> Mixture:
    return Mixture(sizes, batch, seed, **({"weights": WEIGHTS} | settings))  # type: ignore[arg-type]


def enumerated(order: Mixture, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] each: the parts of all samples of the first steps, and the samples."""
    ids = np.concatenate([order.step(step) for step in range(steps)])
    starts = np.cumsum([0, *(SIZES[name] for name in order.parts)])
    return np.searchsorted(starts, ids, "right") - 1, ids


@pytest.mark.parametrize("weights", PROPORTIONS, ids=lambda weights: str(weights)[:20])
def test_a_deal_is_in_proportion_at_every_position(weights: list[int]) -> None:
    deal, total = Deal(weights), sum(weights)
    parts = deal.parts(0, 5000)
    for part, weight in enumerate(weights):
        drawn = np.cumsum(parts == part)
        asked = np.arange(1, 5001) * (weight / total)
        assert np.abs(drawn - asked).max() < 1.5
    far = 10**15 + 7
    assert sum(deal.counts(far)) == far
    for count, weight in zip(deal.counts(far), weights, strict=True):
        assert abs(count - Fraction(far * weight, total)) < 1.5


@pytest.mark.parametrize("weights", PROPORTIONS, ids=lambda weights: str(weights)[:20])
def test_a_deal_says_of_every_draw_where_it_is_and_of_every_position_what_it_is(weights: list[int]) -> None:
    deal = Deal(weights)
    parts = deal.parts(0, 3000)
    for part in range(len(weights)):
        places = np.flatnonzero(parts == part)
        assert [deal.position(part, draw) for draw in range(len(places))] == places.tolist()
    for position in (0, 1, 17, 999, 3000):
        assert deal.counts(position) == np.bincount(parts[:position], minlength=len(weights)).tolist()
        assert np.array_equal(deal.parts(position, 40), deal.parts(0, 3040)[position : position + 40])
    far = 10**15
    after, before = deal.counts(far + 50), deal.counts(far)
    found = np.bincount(deal.parts(far, 50), minlength=len(weights))
    assert found.tolist() == [a - b for a, b in zip(after, before, strict=True)]


def test_a_part_without_weight_is_never_dealt() -> None:
    assert set(Deal([3, 0, 1]).parts(0, 100).tolist()) == {0, 2}


def test_every_epoch_of_a_part_holds_each_of_its_samples_once() -> None:
    order = mixture()
    parts, ids = enumerated(order, 100)
    epochs = np.concatenate([order.epochs(step) for step in range(100)])
    starts = dict(zip(order.parts, (0, 1000, 1100), strict=True))
    for part, (name, size) in enumerate(SIZES.items()):
        own = ids[parts == part] - starts[name]
        assert epochs[parts == part].tolist() == [draw // size for draw in range(len(own))]
        for first in range(0, len(own), size):
            epoch = own[first : first + size]
            assert len(set(epoch.tolist())) == len(epoch) and min(epoch) >= 0 and max(epoch) < size
    books = ids[parts == 2][: 2 * 37].reshape(2, 37)
    assert not np.array_equal(*books) and not np.array_equal(books[0], np.sort(books[0]))


def test_counts_are_what_is_seen_by_counting() -> None:
    order = mixture(epochs={"books": 2}, stages={40: {"web": 0, "code": 1, "books": 1}})
    parts, _ = enumerated(order, 90)
    for step in range(91):
        assert order.counts(step).tolist() == np.bincount(parts[: 16 * step], minlength=3).tolist()
    assert order.counts(5).dtype == np.int64


def test_the_sequence_does_not_depend_on_how_it_is_cut_into_steps() -> None:
    settings = {"epochs": {"books": 2, "code": 1.5}}
    whole = mixture(batch=720, **settings).step(0)
    parts = np.concatenate([mixture(batch=9, **settings).step(step) for step in range(80)])
    assert np.array_equal(whole, parts)
    growing = Curriculum(8, 3, {0: {"sequence_length": 4, "global_batch": 6}, 10: {"global_batch": 30}})
    parts = np.concatenate(
        [Mixture(SIZES, growing, 3, weights=WEIGHTS, **settings).step(s) for s in range(56)]
    )
    assert len(parts) == 3 * 10 + 15 * 46 and np.array_equal(whole, parts)


def test_a_parts_order_does_not_depend_on_the_other_parts() -> None:
    alone = Mixture({"code": 100}, 50, 3, weights={"code": 1}).step(0)
    parts, ids = enumerated(mixture(), 20)
    assert np.array_equal(ids[parts == 1][:50] - 1000, alone)
    other_name = Mixture({"prose": 100}, 50, 3, weights={"prose": 1}).step(0)
    other_seed = Mixture({"code": 100}, 50, 4, weights={"code": 1}).step(0)
    assert not np.array_equal(alone, other_name) and not np.array_equal(alone, other_seed)


def test_a_part_leaves_at_its_cap_and_the_others_share_what_it_leaves() -> None:
    order = mixture(epochs={"books": 2, "code": 1.5})
    parts, _ = enumerated(order, 100)
    books, code = np.flatnonzero(parts == 2), np.flatnonzero(parts == 1)
    assert len(books) == 74 and len(code) == 150
    first = books[-1] + 1  # 0.5 to 0.3 from here on
    assert code[-1] > first
    drawn = (parts[first : code[-1]] == 1).sum()
    assert abs(drawn - 0.375 * (code[-1] - first)) < 1.5
    assert (parts[code[-1] + 1 :] == 0).all()


def test_caps_that_leave_nothing_are_refused_with_the_steps_there_are() -> None:
    order = mixture(epochs={"web": 1, "code": 1, "books": 0.5})  # 1118 samples: 69 steps and 14 samples
    order.check_horizon(69)
    line = (
        "^mixture.epochs: every part that is drawn from has reached its cap after 69 steps, before the 70 "
        "asked for; raise a cap or draw the horizon in$"
    )
    with pytest.raises(ValueError, match=line):
        order.check_horizon(70)
    assert len(order.step(68)) == 16
    with pytest.raises(ValueError, match=line):
        order.step(69)
    mixture(epochs={"web": 1}).check_horizon(10**15)


def test_stages_change_the_weights_from_their_step_on() -> None:
    stages = {30: {"web": 0.1, "code": 0.9, "books": 0}, 60: {"web": 0, "code": 0, "books": 1}}
    parts, _ = enumerated(mixture(stages=stages), 90)
    before, between, after = parts[: 16 * 30], parts[16 * 30 : 16 * 60], parts[16 * 60 :]
    for stretch, shares in ((before, (0.5, 0.3, 0.2)), (between, (0.1, 0.9, 0)), (after, (0, 0, 1))):
        counts = np.bincount(stretch, minlength=3)
        assert np.abs(counts - np.array(shares) * 480).max() < 1.5
    plain, _ = enumerated(mixture(), 30)
    assert np.array_equal(before, plain)
    at_once = mixture(stages={0: {"web": 0, "code": 1, "books": 0}})
    assert at_once.counts(10).tolist() == [0, 160, 0]


def test_blocks_are_of_each_part() -> None:
    ids = mixture({"web": 1000, "code": 100, "books": 37}, block=10).step(0)
    web = ids[ids < 1000]
    assert len(set((web // 10).tolist())) == 1 and len(web) == 8


def test_any_step_is_reached_at_once() -> None:
    order = mixture(
        {f"{i}": 10**10 + i for i in range(20)}, 512, weights={f"{i}": 0.1 + i / 7 for i in range(20)}
    )
    drawn = np.bincount(order.step(10**9) // (10**10 + 20), minlength=20)
    assert (drawn > 0).sum() >= 19
    counts = order.counts(10**9 + 1) - order.counts(10**9)
    assert counts.sum() == 512 and np.abs(drawn - counts).sum() == 0


def test_weights_follow_sizes_a_temperature_or_budgets() -> None:
    sizes = {"a": 900, "b": 100}
    assert weights_of(sizes) == weights_of(sizes, temperature=1) == {"a": 900, "b": 100}
    flat = weights_of(sizes, temperature=2)
    assert flat == {"a": Fraction(3, 4), "b": Fraction(1, 4)}  # 30 to 10
    xlm = weights_of({"en": 55608, "sw": 275}, temperature=1 / 0.3)  # M tokens, XLM-R's alpha of 0.3
    assert float(xlm["sw"]) == pytest.approx(275**0.3 / (275**0.3 + 55608**0.3), abs=1e-9)
    assert weights_of(sizes, budgets={"a": 1e9, "b": 5e8}) == {"a": 10**9, "b": 5 * 10**8}
    assert weights_of(sizes, weights={"b": 0.1, "a": 0.2}) == {"a": Fraction(1, 5), "b": Fraction(1, 10)}


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ({"weights": {"a": 1}}, "mixture.weights: b has none; give it a weight, 0 to leave it out"),
        ({"weights": {"a": 1, "b": -1}}, "mixture.weights.b: -1 is not a number from 0; give one"),
        ({"weights": {"a": 1, "b": math.nan}}, "mixture.weights.b: nan is not a number from 0; give one"),
        ({"weights": {"a": 1, "b": "much"}}, "mixture.weights.b: much is not a number from 0; give one"),
        (
            {"weights": {"a": 0, "b": 0}},
            "mixture.weights: sum to 0; give at least one part a positive weight",
        ),
        ({"weights": {"a": 1, "b": 1, "c": 1}}, "mixture.weights.c: unknown part; the data has a, b"),
        ({"budgets": {"a": 1, "c": 1}}, "mixture.budgets.c: unknown part; the data has a, b"),
        ({"budgets": {"a": 1}}, "mixture.budgets: b has none; give it a weight, 0 to leave it out"),
        ({"temperature": 0}, "mixture.temperature: 0 is not a positive number; give one"),
        ({"temperature": True}, "mixture.temperature: True is not a positive number; give one"),
        (
            {"temperature": 2, "weights": {"a": 1, "b": 1}},
            "mixture.temperature: mixture.weights is given, too; choose one of the two",
        ),
    ],
)
def test_rules_that_make_no_sense_are_refused(rule: dict, line: str) -> None:
    with pytest.raises(ValueError) as error:
        weights_of({"a": 3, "b": 4}, **rule)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"epochs": {"film": 1}}, "mixture.epochs.film: unknown part; the data has web, code, books"),
        ({"epochs": {"web": 0}}, "mixture.epochs.web: 0 is not a positive number; give one"),
        (
            {"epochs": {"books": 0.01}},
            "mixture.epochs.books: 0.01 of 37 samples is none; set its weight to 0",
        ),
        (
            {"stages": {-2: WEIGHTS}},
            "mixture.stages: -2 is not a step; give weights by step, as {1000: {...}}",
        ),
        ({"stages": {7: {"web": 1}}}, "mixture.stages.7: code has none; give it a weight, 0 to leave it out"),
        (
            {"stages": {7: dict.fromkeys(SIZES, 0)}},
            "mixture.stages.7: sum to 0; give at least one part a positive",
        ),
        (
            {"stages": {7: WEIGHTS | {"film": 1}}},
            "mixture.stages.7.film: unknown part; the data has web, code",
        ),
        ({"weights": {"web": 1}}, "mixture.weights: code has none"),
        ({"sizes": {"web": 3, "code": 0, "books": 1}}, "mixture: code has no samples; leave it out"),
        ({"block": 0}, "block: 0 samples is not positive"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(settings: dict, line: str) -> None:
    with pytest.raises(ValueError) as error:
        mixture(**settings)
    assert str(error.value).startswith(line)
