"""What a run tells of itself: records with what was spent until then, and lines at the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from train.config import RunConfig
from train.divergence import position
from train.log import Log
from train.rundir import RunDir
from train.supply import Supply


class Journal:
    """The log of a run for code that all ranks go through: it tells nothing but on rank 0, which opens it.

    Args:
        spent: tokens in the first n steps, and the floating-point operations to train on them.
    """

    def __init__(self, spent: Callable[[int], tuple[int, int]]) -> None:
        self._spent = spent
        self._log: Log | None = None

    def open(self, config: RunConfig, rundir: RunDir, first: int, total_steps: int) -> None:
        """Begin to tell, from step `first` on. Raises ValueError as Log does."""
        self._started = time.perf_counter()
        self._log = Log(config, rundir, first, total_steps)

    def close(self, failed: bool) -> None:
        if self._log:
            self._log.close(failed)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """A record of `step`, with the tokens, operations and seconds until then."""
        if not self._log:
            return
        tokens, operations = self._spent(step)
        elapsed = self._log.elapsed_before + time.perf_counter() - self._started
        self._log.write(kind, step, tokens=tokens, flops=operations, elapsed_s=elapsed, **values)

    def event(self, step: int, name: str, message: str, **values: Any) -> None:
        self.write("event", step, event=name, message=message, **values)

    def say(self, line: str) -> None:
        if self._log:
            self._log.say(line)

    def tell(self, step: int, name: str, message: str, **values: Any) -> None:
        """An event whose message is said, too."""
        self.event(step, name, message, **values)
        self.say(message)

    def has(self, kind: str, step: int) -> bool:
        """Whether a record of this kind was written for this step; False on other ranks than 0."""
        return self._log is not None and self._log.has(kind, step)

    def show_train(self, step: int, total_steps: int, loss: float, tokens_per_s: float, left: float) -> None:
        if self._log:
            self._log.show_train(step, total_steps, loss, tokens_per_s, left)

    def sync(self) -> None:
        if self._log:
            self._log.sync()

    def rewind(self, step: int) -> None:
        if self._log:
            self._log.rewind(step)

    def advance(self, step: int) -> None:
        if self._log:
            self._log.advance(step)

    def begin(self, first: int, total_steps: int, lineage: dict[str, Any] | None, commit: str | None) -> None:
        """How this start of the run begins, on rank 0. lineage: where a fork comes from (see RunDir)."""
        assert self._log is not None
        if lineage and not self._log.has_event("fork"):
            changed = ", ".join(lineage["changed"]) or "nothing"
            message = f"forked from {lineage['parent']} at step {first}: changed {changed}"
            self.tell(first, "fork", message, **lineage)
        elif first < total_steps or not self._log.has_event("finish", first):
            event = "resume" if first else "start"
            self.event(first, event, f"{event} at step {first} of {total_steps}, commit {commit}")
            if first:
                self.say(f"going on from step {first}")
        elif first == total_steps:
            self.say(f"step {first} was the last, and all is done")
        if first > total_steps:
            self.say(f"step {first} is beyond the horizon of {total_steps} steps: nothing to do")

    def stages(self, config: RunConfig, step: int, passed_over: Sequence[int]) -> None:
        """Where the curriculum or the mixture changes with the step that is made next."""
        if not step:
            return
        before, place = (position(s, passed_over) for s in (step - 1, step))
        for what, stages in (("curriculum", config.curriculum), ("mixture", config.mixture.stages)):
            for begins in (begins for begins in stages or {} if before < begins <= place):
                self.tell(step + 1, what, f"{what} from step {step} on: {stages[begins]}")  # type: ignore[index]

    def finish(self, done: int, total_steps: int) -> None:
        """The end of this start of the run, where nothing interrupted it."""
        if not self._log:
            return
        if done == total_steps and not self._log.has_event("finish", done):
            self.event(done, "finish", f"finished {done} steps")
        self._log.summary()


def outline(
    config: RunConfig, supply: Supply, manifest: dict[str, Any], parameters: int, world_size: int
) -> str:
    """A line on what is trained, on how much text, and how."""
    splits = manifest["splits"]
    text = f"{splits['train']['tokens']:,} training tokens" if "train" in splits else "a stream of text"
    sizes = {stage.global_batch * stage.sequence_length for stage in supply.steps.stages}
    a_step = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    return (
        f"{config.directory}: {parameters / 1e6:,.1f} M parameters, {text}, {supply.total_steps:,} steps of"
        f" {a_step} tokens, {world_size} rank(s), ZeRO-{config.engine.zero_stage}, {config.engine.precision}"
    )
