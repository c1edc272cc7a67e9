"""A run: the frozen config becomes engine, loader and loop. `python -m train.run DIRECTORY` is a rank."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from typing import Any

import torch

from data.cli import instantiate, main_guard
from data.loader import Loader, evaluation_batches, training_samples
from data.order import Order
from data.shards import TokenStream
from data.tokenizer import load_tokenizer
from model.flops import count
from model.generate import generate
from train import checkpoint, deepspeed_config, hardware
from train.config import RunConfig, load, micro_batch, total_steps
from train.engine import Engine, World, start_world, stop_world
from train.eval.evaluate import evaluate
from train.log import Log, Meter
from train.optim.groups import decay_groups
from train.rundir import RunDir, environment
from train.start import build_model


class Run:
    """Everything that one rank of a run holds, made from the run directory's frozen config."""

    def __init__(self, rundir: RunDir, config: RunConfig, world: World) -> None:
        self.rundir, self.config, self.world = rundir, config, world
        prepared = rundir.prepared()
        self.stream, self.validation = (TokenStream(prepared, split) for split in ("train", "validation"))
        self.tokenizer = load_tokenizer(prepared / "tokenizer")
        self.baselines = json.loads((prepared / "manifest.json").read_text())["splits"]["validation"]
        self.objective = instantiate(config.objective, "objective")
        self.schedule = instantiate(config.schedule, "schedule")
        with world.device:
            model = build_model(config, self.stream.vocabulary_size)
        self.counts = count(model, config.sequence_length)  # type: ignore[arg-type]
        optimizer = instantiate(config.optim, "optim")
        groups = decay_groups(model, optimizer.weight_decay)
        self.engine = Engine(
            config, model, self.objective, optimizer(groups, config.engine.offload_optimizer), world
        )
        samples = training_samples(self.stream, config.sequence_length)
        self.total_steps = total_steps(config, samples)
        self.shape: dict[str, Any] = {
            "sequence_length": config.sequence_length,
            "micro_batch": micro_batch(config, world.size),
            "rank": world.rank,
            "world_size": world.size,
        }
        order = Order(samples, config.global_batch, config.seed)
        self.loader = Loader(self.stream, order, self.objective.collate, **self.shape)
        peak = hardware.peak_flops(config.engine.precision)
        self.peak_flops = None if peak is None else world.sum(peak)[0]
        self.tokens_per_step = config.global_batch * config.sequence_length
        self.log: Log | None = None  # rank 0 opens it when training starts

    def train(self) -> None:
        """The loop: from the newest checkpoint, or step 0, to the horizon."""
        config, engine, total = self.config, self.engine, self.total_steps
        first = checkpoint.restore(engine, self.rundir.checkpoints)
        self._open_log(first)
        meter = Meter(self.loader)
        for step in range(first, total):
            batches = self.loader.step(step)
            engine.set_learning_rate(self.schedule(step, total))
            result = engine.train_step(step, batches)
            meter.add(result, self.tokens_per_step)
            done = step + 1
            if _due(done, config.log.every, total):
                self._log_train(done, result.gradient_norm, meter)
            with meter.paused():
                if _due(done, config.evaluation.every, total):
                    self._evaluate(done)
                if _due(done, config.checkpoint.every, total):
                    checkpoint.save(engine, self.rundir.checkpoints, done, config.checkpoint.keep)
            if self.log:
                self.log.advance(done)
        self._finish(first)

    def _open_log(self, first: int) -> None:
        """On rank 0: the log, and the record of what this start of the run is."""
        self.started = time.perf_counter()
        if self.world.rank != 0:
            return
        self.log = Log(self.config, self.rundir, first, self.total_steps)
        shutil.copytree(self.rundir.prepared() / "tokenizer", self.rundir.tokenizer, dirs_exist_ok=True)
        found = environment(self.world.size) | {
            "device": hardware.device_name(),
            "peak_flops_per_s": self.peak_flops,
            "total_steps": self.total_steps,
        }
        derived = deepspeed_config.derive(self.config, self.world.size)
        self.rundir.record(derived, dataclasses.asdict(self.counts), found)
        if first == 0:
            baselines = {k: self.baselines[k] for k in ("gzip_bits_per_byte", "xz_bits_per_byte")}
            self._write("baseline", 0, **baselines)
        event = "resume" if first else "start"
        message = f"{event} at step {first} of {self.total_steps}, commit {found['commit']}"
        self._write("event", first, event=event, message=message)
        parameters = self.counts.parameters
        self.log.say(
            f"{self.config.directory}: {parameters / 1e6:,.1f} M parameters,"
            f" {self.stream.tokens:,} training tokens, {self.total_steps:,} steps of"
            f" {self.tokens_per_step:,} tokens, {self.world.size} rank(s),"
            f" ZeRO-{self.config.engine.zero_stage}, {self.config.engine.precision}"
        )
        if first:
            self.log.say(f"going on from step {first}")

    def _log_train(self, step: int, gradient_norm: float, meter: Meter) -> None:
        window = meter.read()
        loss_sum, memory = self.world.sum(window.loss_sum, hardware.memory_bytes())
        if not self.log:
            return
        tokens_per_s = window.tokens / window.seconds
        flops_per_s = tokens_per_s * self.counts.training_flops_per_token
        loss = loss_sum / max(1, window.count)
        self._write(
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
        )
        left = (self.total_steps - step) * window.seconds / window.steps
        self.log.show_train(step, self.total_steps, loss, tokens_per_s, left)

    def _evaluate(self, step: int) -> None:
        batches = evaluation_batches(self.validation, self.objective.collate, **self.shape)
        result = evaluate(self.engine, batches, self.validation.bytes)
        self._write("eval", step, **dataclasses.asdict(result))
        if self.log:
            self.log.say(
                f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f},"
                f" {result.bits_per_byte:.4f} bits per byte"
            )
        if self.config.evaluation.prompt is not None:
            self._write("sample", step, prompt=self.config.evaluation.prompt, text=self._sample())

    def _sample(self) -> str:
        """A continuation of the prompt. All ranks draw it: under ZeRO-3 each holds part of the model.

        They draw equally many tokens, so that none waits for another, and cut at the end of the text after.
        """
        end = self.stream.end_of_text
        prompt = self.tokenizer.encode(self.config.evaluation.prompt, add_special_tokens=False).ids or [end]
        drawn = generate(
            self.engine.model,  # type: ignore[arg-type]
            prompt,
            max_new_tokens=self.config.evaluation.sample_tokens,
            temperature=0.8,
            top_k=50,
            seed=self.config.seed,
        )
        with torch.compiler.set_stance("force_eager"):  # the growing cache would be compiled again each token
            tokens = list(drawn)
        return self.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)

    def _finish(self, first: int) -> None:
        if not self.log:
            return
        if first < self.total_steps:
            self._write(
                "event", self.total_steps, event="finish", message=f"finished {self.total_steps} steps"
            )
        self.log.summary()

    def close(self, failed: bool) -> None:
        """Stop the loader and end the log."""
        self.loader.close()
        if self.log:
            self.log.close(failed)

    def _write(self, kind: str, step: int, **values: Any) -> None:
        if not self.log:
            return
        tokens = step * self.tokens_per_step
        self.log.write(
            kind,
            step,
            tokens=tokens,
            flops=tokens * self.counts.training_flops_per_token,
            elapsed_s=self.log.elapsed_before + time.perf_counter() - self.started,
            **values,
        )


def _due(done: int, every: int | None, total: int) -> bool:
    return done == total or (every is not None and done % every == 0)


def run(rundir: RunDir) -> None:
    """One rank of the run that `train.start.begin` froze in rank 0's directory, and locked."""
    world = start_world()
    try:
        path = world.broadcast(rundir.path)  # names may hold a time, which every rank composed for itself
        rundir = rundir if world.rank == 0 else RunDir(path)
        rank = Run(rundir, load(rundir.config), world)
        failed = True
        try:
            rank.train()
            failed = False
        finally:
            rank.close(failed)
    except ValueError as error:
        # What a person can get wrong was checked before: from here on it is a bug, and keeps its traceback.
        raise RuntimeError(f"rank {world.rank} failed") from error
    finally:
        stop_world()


if __name__ == "__main__":
    main_guard(lambda: run(RunDir(sys.argv[1])))
