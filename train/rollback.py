"""The way back from a step that diverged: to which checkpoint, and past which batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from train import checkpoint
from train.divergence import offending, rollback_targets
from train.rundir import RunDir


def way_back(
    rundir: RunDir,
    step: int,
    pass_over: int,
    passed_over: Sequence[int],
    rollbacks: list[int],
    say: Callable[[str], None],
) -> tuple[int, list[int], str | None]:
    """Make the checkpoint to go back to from `step` the newest, and write down what is passed over.

    The newer checkpoints go before that is written down, so that a kill in between leaves a run that comes to
    `step` again and does the same.

    Args:
        pass_over: how many batches, that of `step` and those before it. passed_over: positions in the order
            of the data that are left out already. rollbacks: the steps of all rollbacks of the run.
        say: is told in one line of each checkpoint that is damaged.

    Returns the step of the checkpoint that is then the newest (0: there is none), the positions to leave out
    from now on, and why it cannot be gone back to.
    """
    left_out: list[int] = []
    problem: str | None = "there is no checkpoint before it to roll back to"
    for target in rollback_targets(checkpoint.steps(rundir.checkpoints), step, pass_over):
        path = checkpoint.path_of(rundir.checkpoints, target)
        if damage := checkpoint.damage(path):
            say(f"{path}: {damage}; passed over")
            continue
        left_out, problem = offending(step, target, pass_over, passed_over), None
        try:
            checkpoint.remove_after(rundir.checkpoints, target)
            rundir.write_passed_over(sorted({*passed_over, *left_out}), rollbacks)
        except OSError as error:
            problem = f"it cannot be rolled back: {error}"
        break
    return max(checkpoint.steps(rundir.checkpoints), default=0), left_out, problem
