"""launch.bench_optimizers: an update makes the products that its paper says, within the step's time."""

from __future__ import annotations

import pytest

from data.prepare import prepare
from launch.bench_data import choice
from launch.bench_optimizers import BASELINE, Cost, costs, papers, rules_of, table
from launch.bench_training import Shape, build
from tests.distributed import run_ranks
from tests.tiny import corpus
from train.optim.soap import SOAP

TINY = Shape("tiny", layers=1, width=32, heads=2, sequence_length=32, batch=4, vocabulary_size=300)


def on_this_rank(folder: str) -> list[Cost]:
    from train.engine import start_world

    data = choice(
        "data/text",
        {"source": {"paths": f"{folder}/text/*.txt"}, "directory": folder, "validation": {"share": 0.2}},
    )
    prepared = prepare(data, choice("tokenizer/bytes"), progress=False)
    return costs(TINY, rules_of([BASELINE, "muon", "soap"]), 2, start_world(), prepared)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cost]:
    folder = tmp_path_factory.mktemp("bench")
    corpus(folder / "text")
    (measured,) = run_ranks(on_this_rank, 1, str(folder))
    return {cost.rule: cost for cost in measured}


def test_products_are_those_of_the_papers(found: dict[str, Cost]) -> None:
    # Width 32: queries, keys and values 96 x 32, the projection 32 x 32, the feed-forward's 128 x 32 twice.
    assert found["muon"].paper == 5 * 2 * sum(2 * n * 32**2 + 32**3 for n in (96, 32, 128, 128))
    assert found["muon"].flops == found["muon"].paper
    assert found["soap"].flops == found["soap"].paper
    assert found[BASELINE].flops < found["muon"].flops / 50 and found[BASELINE].paper is None


def test_a_side_with_its_own_basis_costs_nothing() -> None:
    model = build(TINY)
    both, one = (papers(SOAP(1e-3, max_precondition_dim=most), model) for most in (4096, 299))
    assert both is not None and one is not None
    assert both - one == 8 * 300 * (300 * 32)  # of the token table


def test_updates_are_part_of_steps(found: dict[str, Cost]) -> None:
    for cost in found.values():
        assert 0 < cost.update_s < cost.step_s and cost.model_flops > 0
    shown = table(list(found.values()), TINY)
    assert [column.header for column in shown.columns][0] == "rule" and shown.row_count == 3


def test_an_unknown_rule_is_one_line() -> None:
    with pytest.raises(ValueError, match="^--rules: there is no adamx; choose from adabound, adafactor"):
        rules_of(["adamx"])
