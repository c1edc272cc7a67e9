import pytest

from data.curriculum import Curriculum

GROWING = {
    0: {"sequence_length": 16, "global_batch": 8},  # 2 samples of 64
    3: {"sequence_length": 32},  # 4
    10: {"sequence_length": 64, "global_batch": 6},  # 6
    20: {"global_batch": 12},  # 12
}


def test_steps_follow_each_other_without_gaps() -> None:
    curriculum = Curriculum(64, 4, GROWING)
    position = 0
    for step in range(40):
        assert curriculum.span(step)[0] == position
        position += curriculum.span(step)[1]


def test_a_step_takes_the_samples_that_its_sequences_are_cut_from() -> None:
    curriculum = Curriculum(64, 4, GROWING)
    sizes = {
        step: (curriculum.span(step)[1], curriculum.rows(step)) for step in (0, 2, 3, 9, 10, 19, 20, 10**9)
    }
    assert sizes == {
        0: (2, 4), 2: (2, 4), 3: (4, 2), 9: (4, 2), 10: (6, 1), 19: (6, 1), 20: (12, 1), 10**9: (12, 1)
    }  # fmt: skip
    stages = [curriculum.stage(step)[1:3] for step in (2, 3, 19, 20)]
    assert stages == [(16, 8), (32, 8), (64, 6), (64, 12)]
    assert curriculum.lengths == [16, 32, 64]


def test_tokens_are_those_of_the_sequences() -> None:
    curriculum = Curriculum(64, 4, GROWING)
    tokens = 0
    for step in range(40):
        assert curriculum.span(step)[0] * curriculum.sequence_length == tokens
        stage = curriculum.stage(step)
        tokens += stage.sequence_length * stage.global_batch


@pytest.mark.parametrize("samples", [1, 2, 3, 6, 7, 34, 35, 94, 95, 1000])
def test_the_steps_that_an_epoch_takes_are_those_that_begin_in_it(samples: int) -> None:
    curriculum = Curriculum(64, 4, GROWING)
    steps = curriculum.steps(samples)
    assert curriculum.span(steps)[0] >= samples > curriculum.span(steps - 1)[0]


def test_what_is_not_said_is_as_it_was() -> None:
    curriculum = Curriculum(64, 6, {5: {"sequence_length": 32}, 7: {"global_batch": 8}})
    assert [curriculum.stage(step)[1:3] for step in (0, 4, 5, 6, 7)] == [
        (64, 6), (64, 6), (32, 6), (32, 6), (32, 8)
    ]  # fmt: skip
    assert [Curriculum(64, 6, {}).span(step) for step in (0, 5)] == [(0, 6), (30, 6)]


def test_a_later_stage_changes_nothing_of_the_steps_before_it() -> None:
    shorter = Curriculum(64, 4, {step: stage for step, stage in GROWING.items() if step < 20})
    longer = Curriculum(64, 4, GROWING)
    assert [shorter.span(step) for step in range(20)] == [longer.span(step) for step in range(20)]


def test_any_step_is_reached_at_once() -> None:
    curriculum = Curriculum(64, 4, GROWING)
    assert curriculum.span(10**12)[0] == 2 * 3 + 4 * 7 + 6 * 10 + 12 * (10**12 - 20)


def test_micro_batches_divide_every_stage() -> None:
    curriculum = Curriculum(64, 4, GROWING)  # of 2, 4, 6 and 12 samples
    assert [curriculum.micro_batch(world_size) for world_size in (1, 2, 3)] == [2, 1, 0]
    curriculum.check(1, 2)
    curriculum.check(2, 1)
    line = (
        "^curriculum.0: 8 sequences of 16 are 2 of 64, not divisible by micro_batch 2 x 2 ranks; "
        "choose another global_batch or micro_batch$"
    )
    with pytest.raises(ValueError, match=line):
        curriculum.check(2, 2)
    with pytest.raises(ValueError, match="^curriculum.10: 6 sequences of 64 are 6 of 64"):
        Curriculum(64, 4, {10: {"global_batch": 6}}).check(4, 1)
    with pytest.raises(ValueError, match="^curriculum.0: .* micro_batch 0 x 3 ranks"):
        curriculum.check(0, 3)


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ({3: {"sequence_length": 24}}, "3.sequence_length: 24 does not divide sequence_length, 64"),
        ({3: {"sequence_length": 128}}, "3.sequence_length: 128 does not divide sequence_length, 64"),
        ({3: {"sequence_length": 16, "global_batch": 6}}, "3.global_batch: 6 sequences of 16 are no whole"),
        ({3: {"global_batch": 0}}, "3.global_batch: 0 is not a positive integer"),
        ({3: {"global_batch": 2.5}}, "3.global_batch: 2.5 is not a positive integer"),
        ({3: {"batch": 2}}, "3.batch: unknown key"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages: dict, line: str) -> None:
    with pytest.raises(ValueError) as error:
        Curriculum(64, 4, stages)
    assert str(error.value).startswith(f"curriculum.{line}") and "\n" not in str(error.value)


@pytest.mark.parametrize("step", [-1, "later", 1.5, True])
def test_stages_go_by_step(step: object) -> None:
    with pytest.raises(ValueError, match=f"^curriculum: {step} is not a step; give stages by step"):
        Curriculum(64, 4, {step: {"global_batch": 2}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="^step: -1"):
        Curriculum(64, 4, {}).span(-1)
