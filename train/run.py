"""A run: the frozen config becomes engine, loader and loop. `python -m train.run DIRECTORY` is a rank."""

from __future__ import annotations

from train.stop import REQUEUE, Stop, current, install

if __name__ == "__main__":
    install()  # before what takes seconds to import

import dataclasses
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.cli import instantiate, main_guard
from data.loader import Batch, Loader, evaluation_batches, pack
from data.shards import TokenStream, read_manifest
from data.stream import StreamPacking, merge
from data.tokenizer import load_tokenizer
from model.flops import count
from train import checkpoint, deepspeed_config, hardware
from train.config import RunConfig, load, micro_batch
from train.divergence import Event, Monitor, position
from train.elastic import redistribute
from train.engine import Engine, Step, World, start_world, stop_world
from train.eval.evaluate import evaluate
from train.eval.sample import respond
from train.fork import begins_on_other_text
from train.journal import Journal, outline
from train.log import Meter
from train.lookahead import look_ahead
from train.noise import Averages, estimate
from train.objective.base import AUXILIARY
from train.optim.groups import parameter_groups
from train.pretrained import load_pretrained
from train.ranks import end_torchrun, end_with, lost_in_one_line, say
from train.rollback import way_back
from train.rundir import RunDir, environment
from train.start import build_model, scales
from train.supply import reading, supply
from train.watchdog import RESTORE, Watchdog


class Interrupted(Exception):
    """All ranks are to stop here."""


class Halted(Exception):
    """The run cannot go on, or by its policy is not to. One line; raised on all ranks at once."""


class Run:
    """Everything that one rank of a run holds, made from the run directory's frozen config."""

    def __init__(self, rundir: RunDir, config: RunConfig, world: World) -> None:
        self.rundir, self.config, self.world = rundir, config, world
        self.watchdog = Watchdog(world, config.engine.hang_timeout, rundir.path)
        prepared = rundir.prepared()
        self.tokenizer = load_tokenizer(prepared / "tokenizer")
        self.objective = instantiate(config.objective, "objective")
        self.supply = supply(config, self.objective, prepared)
        self.packing, self.collate = self.supply.packing, self.supply.collate
        self.manifest = read_manifest(prepared)
        self.validation = TokenStream(prepared, "validation")
        self.schedule = instantiate(config.schedule, "schedule")
        with world.device:
            model = build_model(config, self.manifest["vocabulary_size"])
        share = self.objective.predicted_share
        self.counts = count(model, config.sequence_length, share)  # type: ignore[arg-type]
        self.flops_per_token = {
            length: count(model, length, share).training_flops_per_token  # type: ignore[arg-type]
            for length in self.supply.steps.lengths
        }
        if config.model.get("init_from") and not checkpoint.steps(rundir.checkpoints):
            load_pretrained(model, Path(config.model["init_from"]))
        rule = instantiate(config.optim, "optim")
        scaled = scales(config, model, self.manifest["vocabulary_size"], rule)
        groups = parameter_groups(model, rule, scaled)
        self.engine = Engine(config, model, self.objective, rule, groups, world)
        self.saver = checkpoint.Saver(self.engine, rundir.checkpoints, config.checkpoint)
        self.layout = {"world_size": world.size, "zero_stage": config.engine.zero_stage}
        self.held_out = pack(self.validation, config.packing.method, self.collate, training=False)
        self.total_steps = self.supply.total_steps
        self.shape: dict[str, Any] = {
            "micro_batch": micro_batch(config, world.size),
            "rank": world.rank,
            "world_size": world.size,
        }
        collates = self.supply.collates
        self.loader = Loader(self.packing, self.supply.order, self.collate, **self.shape, collates=collates)
        peak = hardware.peak_flops(config.engine.precision)
        self.peak_flops = None if peak is None else world.sum(peak)[0]
        self.meter = Meter(self.loader)
        self.noise = Averages()
        self.journal = Journal(self._spent)
        self.passed_over: list[int] = []  # positions in the order of the data that are left out, sorted
        self.monitor = Monitor(config.divergence)
        self.event: Event | None = None  # what the monitor says of the step that is being made

    def train(self, stop: Stop) -> str | None:
        """The loop: from the newest whole checkpoint, or step 0, to the horizon.

        Returns what interrupted it, then saved and to be continued; None where it has finished.

        Raises:
            Halted: it stops by its policy, or where it is cannot be saved.
        """
        self.stop = stop
        first, notes = self._restore()
        self.watchdog.mark(first, "start")
        self.done = self.saved = self.saver.begun = first  # steps: made, and in the newest checkpoint
        stop.training(self.config.stop.grace, self.config.stop.time_limit)
        self._open_log(first, notes)
        self.meter.start()
        try:
            if first and self._evaluation_due():  # the run had ended before it was made
                self._evaluate()
                self.journal.advance(self.done)
            while self.done < self.total_steps:
                self._step(self.done)
                self._look_around()
        except Interrupted:
            reason = next(filter(None, self.world.gather(stop.requested)))
            told = self._save_now()
            self.journal.event(self.done, "interrupt", f"{reason} at step {self.done}", reason=reason)
            if self.saved != self.done:
                raise Halted(f"{reason}: {told}") from None
            stop.saved()
            self.journal.say(f"{reason}: {told}; the same command goes on from there")
            return reason
        self._finish()
        return None

    def _step(self, step: int) -> None:
        """The optimizer step after `step` of them, and what is due then."""
        config, total = self.config, self.total_steps
        self.journal.stages(config, step, self.passed_over)
        self.watchdog.mark(step, "data")
        with reading():
            batches = self.loader.step(position(step, self.passed_over))
        self.watchdog.mark(step, "step")
        self.engine.set_learning_rate(self.schedule(step, total))
        self.event = None
        part = None
        if config.noise.every is not None and (step + 1) % config.noise.every == 0:
            with self.meter.paused():
                part = self.engine.part_of_step(step, batches)
        result = self.engine.train_step(step, batches, lambda loss, norm: self._accepts(step, loss, norm))
        if self.event and self._react(step, self.event):
            return
        if self.event and self.event.action == "skip":  # its loss would hide those of the steps beside it
            result = dataclasses.replace(result, loss_sum=torch.zeros(()), count=0, metrics={})
        before, after = self._spent(step), self._spent(step + 1)
        self.meter.add(result, *(b - a for a, b in zip(before, after, strict=True)))
        self.done = step + 1
        if _due(self.done, config.log.every, total):
            self._log_train(self.done, result.gradient_norm, self.meter)
        if part is not None:
            self._log_noise(part, result)
        with self.meter.paused():
            if _due(self.done, config.checkpoint.every, total):
                self._begin_save()
            if self._evaluation_due():
                self._evaluate()
        self.journal.advance(self.done)

    def _look_around(self) -> None:
        """Between two steps: end the save that all ranks have written, and raise Interrupted on all of them
        where one is asked to stop."""
        writing = self.saver.pending and not self.saver.finished
        stop, unwritten = self.world.agree(self.stop.requested is not None, writing)
        if not unwritten:
            self._settle()
        if stop and self.done < self.total_steps:
            raise Interrupted

    def _accepts(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Whether the update of `step` is made."""
        self.event = self.monitor.judge(step, loss, gradient_norm)
        return self.event is None or self.event.action == "report"

    def _react(self, step: int, event: Event) -> bool:
        """Do what the policy says; returns whether the run was rolled back.

        Raises:
            Halted: to stop, or there is nothing to go back to.
        """
        told = {k: v for k, v in dataclasses.asdict(event).items() if k not in ("name", "message")}
        if event.action in ("report", "skip"):
            message = f"{event.message}; its update is {'skipped' if event.action == 'skip' else 'made'}"
            after = step + 1  # a checkpoint of `step` is from before it
            self.journal.tell(after, event.name, message, **told)
            return False
        if event.action == "rollback":
            left_out = self._roll_back(step)
            if isinstance(left_out, list):
                batches = f"{len(left_out)} batch{'es' * (len(left_out) > 1)} passed over"
                message = f"{event.message}; rolled back to step {self.done}, {batches}"
                told |= {"positions": left_out, "to_step": self.done}
                self.journal.tell(self.done, event.name, message, **told)
                return True
            event = dataclasses.replace(event, message=f"{event.message}; {left_out}")
            told["action"] = "stop"
        saved = self._save_now()
        self.journal.event(step, event.name, event.message, **told)
        raise Halted(f"{event.message}; stopped before its update, {saved}")

    def _roll_back(self, step: int) -> list[int] | str:
        """Bring the run back to before the batches that led to `step`, which are passed over from now on.

        Returns their positions; or why it cannot.
        """
        self._settle()
        self.watchdog.mark(step, RESTORE)
        self.monitor.rolled_back(step)
        found = None
        if self.world.rank == 0:
            pass_over, rollbacks = self.config.divergence.pass_over, self.monitor.rollbacks
            found = way_back(self.rundir, step, pass_over, self.passed_over, rollbacks, self.journal.say)
        back, left_out, problem = self.world.broadcast(found)
        if problem:
            self.saved = min(back, self.done - 1)  # even if there is one of this step: it may be damaged
            return problem
        self.saved = back
        self.passed_over = sorted({*self.passed_over, *left_out})
        self._check_horizon()
        self._load(back)
        self.done = back
        self.journal.rewind(back)
        return left_out

    def _spent(self, step: int) -> tuple[int, int]:
        """Tokens in the first `step` steps, and the floating-point operations to train on them."""
        tokens = self.supply.tokens(step, self.passed_over)
        operations = sum(count * self.flops_per_token[length] for length, count in tokens.items())
        return sum(tokens.values()), operations

    def _state(self, done: int) -> dict[str, Any]:
        """What a checkpoint keeps of the loop."""
        return {
            "step": done,
            "layout": self.layout,
            "passed_over": self.passed_over,
            "monitor": self.monitor.state(),
            "meter": self.meter.state(self.world.sum),
            "noise": dataclasses.asdict(self.noise),
            "stream": self._stream_state(),
        }

    def _stream_state(self) -> dict[str, Any] | None:
        """Where a stream has been read to by all ranks; None where the data is prepared."""
        states = self.world.gather(self.loader.state())
        return None if states[0] is None else merge(states)

    def _restore(self) -> tuple[int, list[str]]:
        """Bring the engine to the newest whole checkpoint: its step, 0 without one, and what to tell."""
        notes: list[str] = []
        found: int | str | None = None
        history: tuple[list[int], list[int]] = [], []
        self.watchdog.mark(0, RESTORE)
        if self.world.rank == 0:
            try:
                history = self.rundir.passed_over()
                found = checkpoint.newest_good(self.rundir.checkpoints, notes.append)
            except (ValueError, OSError) as error:
                found = str(error)
        found, notes, history = self.world.broadcast((found, notes, history))
        if isinstance(found, str):
            raise Halted(found)
        if found is None and notes:
            notes.append("no checkpoint is left: training starts from the beginning")
        self.passed_over, rollbacks = history
        self._check_horizon()
        self.monitor = Monitor(self.config.divergence, rollbacks)
        return (0 if found is None else self._load(found)), notes

    def _load(self, step: int) -> int:
        path = checkpoint.path_of(self.rundir.checkpoints, step)
        state = checkpoint.read_state(path)
        if state["layout"] == self.layout and self.engine.loads_own_layout:
            self.engine.load(path)
        else:
            redistribute(self.engine, path, state["layout"]["zero_stage"])
        self.loaded_layout = state["layout"]
        self.passed_over = sorted({*self.passed_over, *state["passed_over"]})
        if begins_on_other_text(self.rundir, step):
            self.monitor = Monitor(self.config.divergence, self.monitor.rollbacks)
            self.noise = Averages()
            self.meter.read()
            if isinstance(self.packing, StreamPacking):  # its text begins here
                place = position(step, self.passed_over)
                self.loader.load_state(self.packing.state_at(self.supply.steps.span(place)[0]))
        else:
            if state.get("stream") is not None:
                self.loader.load_state(state["stream"])
            self.monitor.load_state(state["monitor"])
            self.noise = Averages(**state.get("noise", {}))
            if "meter" in state:  # not in those of earlier versions
                self.meter.load_state(state["meter"], self.world.rank)
        self.world.barrier()  # for whoever reads it fastest to be told from one who hangs
        return state["step"]

    def _check_horizon(self) -> None:
        """Raises Halted where a mixture ends before the horizon, for what was passed over."""
        try:
            self.supply.check_horizon(len(self.passed_over))
        except ValueError as error:
            raise Halted(str(error)) from None

    def _begin_save(self) -> None:
        self.watchdog.mark(self.done, "save")
        self._settle()  # where the one before is still under way
        self.saver.save(self.done, self._state(self.done))

    def _save_now(self) -> str:
        """Have a checkpoint of where the run is, before anything else; returns whether there is one."""
        self._settle()
        if self.saved != self.done:
            self._begin_save()
            self._settle()
        if self.saved == self.done:
            return f"saved at step {self.done}" if self.done else "before the first step: nothing to save"
        last = f"the last checkpoint is of step {self.saved}" if self.saved > 0 else "there is no checkpoint"
        return f"step {self.done} could not be saved, {last}; make room, and the same command goes on"

    def _settle(self) -> None:
        """Wait for the save under way, if there is one, and end it."""
        if not self.saver.pending:
            return
        self.saver.wait()
        saved = self.saver.settle()
        if saved.error is None:
            self.saved = saved.step
            self.journal.sync()
            timed = {"stall_s": saved.stall_s, "write_s": saved.write_s, "bytes": saved.bytes}
            self.journal.write("checkpoint", saved.step, **timed)
            return
        message = f"no checkpoint of step {saved.step} ({saved.error}); the one before stays, the run goes on"
        self.journal.tell(saved.step, "checkpoint_failed", message, error=saved.error)

    def _evaluation_due(self) -> bool:
        """Whether there is to be an evaluation after the steps done, and has not been one."""
        if not _due(self.done, self.config.evaluation.every, self.total_steps):
            return False
        return not self.world.broadcast(self.journal.has("eval", self.done))

    def _open_log(self, first: int, notes: list[str]) -> None:
        """On rank 0: the log, and the record of what this start of the run is."""
        if self.world.rank != 0:
            return
        self.journal.open(self.config, self.rundir, first, self.total_steps)
        shutil.copytree(self.rundir.prepared() / "tokenizer", self.rundir.tokenizer, dirs_exist_ok=True)
        found = environment(self.world.size) | {
            "device": hardware.device_name(),
            "peak_flops_per_s": self.peak_flops,
            "total_steps": self.total_steps,
        }
        derived = deepspeed_config.derive(self.config, self.world.size)
        self.rundir.record(derived, dataclasses.asdict(self.counts), found)
        if not self.journal.has("baseline", 0):
            plan = self.config, self.supply, self.objective
            look_ahead(self.journal, *plan, self.held_out, self.manifest, self.shape["micro_batch"])
        sizes = self.counts.parameters, self.world.size
        self.journal.say(outline(self.config, self.supply, self.manifest, *sizes))
        for note in notes:
            self.journal.tell(first, "passed_over_checkpoint", note)
        self.journal.begin(first, self.total_steps, self.rundir.lineage(), found["commit"])
        if 0 < first < self.total_steps and self.loaded_layout != self.layout:
            before, now = (
                f"{layout['world_size']} rank(s), ZeRO-{layout['zero_stage']}"
                for layout in (self.loaded_layout, self.layout)
            )
            self.journal.tell(first, "converted", f"the checkpoint of {before} is dealt out to {now}")

    def _log_train(self, step: int, gradient_norm: float, meter: Meter) -> None:
        window = meter.read()
        names = sorted(window.metrics)
        loss_sum, memory, *sums = self.world.sum(
            window.loss_sum, hardware.memory_bytes(), *(window.metrics[name] for name in names)
        )
        tokens_per_s = window.tokens / window.seconds
        flops_per_s = window.flops / window.seconds
        metrics = dict(zip(names, sums, strict=True))
        loss = (loss_sum - metrics.get(AUXILIARY, 0.0)) / window.count if window.count else math.nan
        self.journal.write(
            "train",
            step,
            loss=loss,
            learning_rate=self.engine.learning_rate,
            gradient_norm=gradient_norm,
            tokens_per_s=tokens_per_s,
            flops_per_s=flops_per_s,
            peak_share=flops_per_s / self.peak_flops if self.peak_flops else None,
            memory_bytes=int(memory),
            data_wait_share=window.data_wait_share,
            skipped_steps=window.skipped,
            **self.supply.shares(position(step, self.passed_over)),
            **metrics,
        )
        left = (self.total_steps - step) * window.seconds / window.steps
        self.journal.show_train(step, self.total_steps, loss, tokens_per_s, left)

    def _log_noise(self, part: Step, whole: Step) -> None:
        """The gradient noise scale of the step that was just made, in tokens and in sequences.

        It is left out where a gradient was not finite or not accepted, or the part held no labels.
        """
        if whole.skipped or not math.isfinite(part.gradient_norm) or not 0 < part.count < whole.count:
            return
        stage = self.supply.steps.stage(position(self.done - 1, self.passed_over))
        tokens = stage.global_batch * stage.sequence_length
        sizes = tokens * part.count / whole.count, tokens
        found = estimate(part.gradient_norm**2, sizes[0], whole.gradient_norm**2, sizes[1])
        self.noise = self.noise.after(found)
        scale = self.noise.scale
        sequences = None if scale is None else scale / stage.sequence_length
        self.journal.write(
            "noise", self.done, scale=scale, scale_sequences=sequences, **dataclasses.asdict(found)
        )

    def _evaluate(self) -> None:
        """Raises Interrupted between two batches."""
        step = self.done
        batches = evaluation_batches(self.held_out, self.collate, **self.shape)
        whole = (self.validation.bytes, self.objective.predicts_text)
        sample = None
        with self.engine.averaged():
            batches = self._interruptible(step, batches)
            result = evaluate(self.engine.evaluate, self.world.sum, batches, *whole)
            if self.config.evaluation.prompt is not None:
                self.watchdog.mark(step, "sample")
                sample = self._sample()
        values = dataclasses.asdict(result)
        self.journal.write("eval", step, **values.pop("metrics"), **values)
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        self.journal.say(
            f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}{bits}"
        )
        if sample is not None:
            self.journal.write("sample", step, prompt=self.config.evaluation.prompt, text=sample)

    def _interruptible(self, step: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with reading():
                batch = next(batches, None)
            if batch is None:
                return
            self.watchdog.mark(step, "evaluate")
            if self.world.agree(self.stop.requested is not None)[0]:
                raise Interrupted
            yield batch

    def _sample(self) -> str:
        """The model's answer to the prompt. All ranks draw it: under ZeRO-3 each holds part of the model.

        They draw equally many tokens, so that none waits for another.
        """
        prompt, tokens = self.config.evaluation.prompt, self.config.evaluation.sample_tokens
        assert prompt is not None
        model, sampling = self.engine.model, {"temperature": 0.8, "top_k": 50, "seed": self.config.seed}
        with torch.compiler.set_stance("force_eager"):  # the growing cache would be compiled again each token
            drawn = respond(model, self.tokenizer, prompt, max_new_tokens=tokens, to_the_end=True, **sampling)
            return "".join(drawn)

    def _finish(self) -> None:
        told = self._save_now()  # once more, where the last one failed
        if self.saved != self.done:
            raise Halted(told)
        self.journal.finish(self.done, self.total_steps)

    def close(self, failed: bool) -> None:
        """Stop the threads and end the log."""
        self.watchdog.close()
        self.saver.close()
        self.loader.close()
        self.journal.close(failed)


def _due(done: int, every: int | None, total: int) -> bool:
    return done == total or (every is not None and done % every == 0)


def run(rundir: RunDir) -> None:
    """One rank of the run that `train.start.begin` froze in rank 0's directory, and locked.

    Raises:
        SystemExit: with REQUEUE, where it was interrupted and saved; with 1, where it is not to go on.
    """
    with current() as stop, lost_in_one_line():
        world = start_world()
        try:
            path = world.broadcast(rundir.path)  # names may hold a time, which every rank composed for itself
            rundir = rundir if world.rank == 0 else RunDir(path)
            with _closing(Run(rundir, load(rundir.config), world)) as rank:
                interrupted = rank.train(stop)
        except Halted as error:
            if world.rank == 0:
                say(f"error: {error}")
            world.barrier()  # rank 0 is not to be cut off by the others' end
            end_torchrun()
            sys.exit(1)
        except OSError as error:
            sys.exit(f"error: rank {world.rank}: {error}")
        except ValueError as error:
            # What a person can get wrong was checked before: from here on it is a bug, and keeps its trace.
            raise RuntimeError(f"rank {world.rank} failed") from error
        finally:
            rundir.unlock()
            stop_world()
    if interrupted:
        if interrupted not in ("SIGTERM", "SIGINT"):  # a launcher that got these ends by itself
            end_torchrun()
        sys.exit(REQUEUE)


@contextmanager
def _closing(rank: Run) -> Iterator[Run]:
    failed = True
    try:
        yield rank
        failed = False
    finally:
        rank.close(failed)


if __name__ == "__main__":
    end_with(lambda: main_guard(lambda: run(RunDir(sys.argv[1]))))
