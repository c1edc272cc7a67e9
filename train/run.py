"""A run: the frozen config becomes engine, loader and loop. `python -m train.run DIRECTORY` is a rank."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data.cli import instantiate, main_guard
from data.loader import Loader, evaluation_batches, pack
from data.order import Order
from data.shards import TokenStream, read_manifest
from data.tokenizer import load_tokenizer
from model.flops import count
from train import checkpoint, deepspeed_config, hardware
from train.config import RunConfig, load, micro_batch, total_steps
from train.engine import Engine, World, end_process, start_world, stop_world
from train.eval.evaluate import evaluate, unigram_loss
from train.eval.sample import respond
from train.log import Log, Meter
from train.objective.base import AUXILIARY
from train.optim.groups import decay_groups
from train.pretrained import load_pretrained
from train.rundir import RunDir, environment
from train.start import build_model

UNIGRAM_TOKENS = 2**20  # of training text that the unigram model counts


class Run:
    """Everything that one rank of a run holds, made from the run directory's frozen config."""

    def __init__(self, rundir: RunDir, config: RunConfig, world: World) -> None:
        self.rundir, self.config, self.world = rundir, config, world
        prepared = rundir.prepared()
        self.tokenizer = load_tokenizer(prepared / "tokenizer")
        self.baselines = read_manifest(prepared)["splits"]["validation"]
        self.objective = instantiate(config.objective, "objective")
        self.collate = self.objective.collator(prepared, config.sequence_length, config.packing.isolate)
        self.stream = self.objective.training_stream(prepared)
        self.validation = TokenStream(prepared, "validation")
        self.schedule = instantiate(config.schedule, "schedule")
        with world.device:
            model = build_model(config, self.stream.vocabulary_size)
        share = self.objective.predicted_share
        self.counts = count(model, config.sequence_length, share)  # type: ignore[arg-type]
        if config.model.get("init_from") and not checkpoint.steps(rundir.checkpoints):
            load_pretrained(model, Path(config.model["init_from"]))
        optimizer = instantiate(config.optim, "optim")
        groups = decay_groups(model, optimizer.weight_decay)
        self.engine = Engine(
            config, model, self.objective, optimizer(groups, config.engine.offload_optimizer), world
        )
        self.packing = pack(self.stream, config.packing.method, self.collate, training=True)
        self.held_out = pack(self.validation, config.packing.method, self.collate, training=False)
        self.total_steps = total_steps(config, self.packing.samples)
        self.shape: dict[str, Any] = {
            "micro_batch": micro_batch(config, world.size),
            "rank": world.rank,
            "world_size": world.size,
        }
        order = Order(self.packing.samples, config.global_batch, config.seed)
        self.loader = Loader(self.packing, order, self.collate, **self.shape)
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
            self._look_ahead()
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

    def _look_ahead(self) -> None:
        """Log what the first samples say: how well positions are used, what a unigram model would lose."""
        assert self.log is not None
        count = min(self.packing.samples, 1 + UNIGRAM_TOKENS // self.config.sequence_length)
        order = Order(self.packing.samples, count, self.config.seed).step(0)
        size = self.shape["micro_batch"]
        training = [
            self.collate([self.packing.sample(int(i)) for i in order[first : first + size]])
            for first in range(0, count, size)
        ]
        used, positions = map(sum, zip(*map(self.objective.used, training), strict=True))
        usage = self.packing.usage()
        self._write("packing", 0, used_share=used / positions, **dataclasses.asdict(usage))
        self.log.say(
            f"packing.{self.config.packing.method}: {used / positions:.2%} of the positions used (of"
            f" {count:,} samples), {usage.cut_documents:,} of {self.stream.documents:,} documents cut,"
            f" {usage.dropped_tokens:,} tokens dropped"
        )
        held_out = evaluation_batches(self.held_out, self.collate, micro_batch=size, rank=0, world_size=1)
        loss = unigram_loss(training, held_out, self.stream.vocabulary_size)
        compressed = {k: self.baselines[k] for k in ("gzip_bits_per_byte", "xz_bits_per_byte")}
        self._write("baseline", 0, unigram_loss=loss, **compressed)

    def _log_train(self, step: int, gradient_norm: float, meter: Meter) -> None:
        window = meter.read()
        names = sorted(window.metrics)
        loss_sum, memory, *sums = self.world.sum(
            window.loss_sum, hardware.memory_bytes(), *(window.metrics[name] for name in names)
        )
        if not self.log:
            return
        tokens_per_s = window.tokens / window.seconds
        flops_per_s = tokens_per_s * self.counts.training_flops_per_token
        metrics = dict(zip(names, sums, strict=True))
        loss = (loss_sum - metrics.get(AUXILIARY, 0.0)) / max(1, window.count)
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
            **metrics,
        )
        left = (self.total_steps - step) * window.seconds / window.steps
        self.log.show_train(step, self.total_steps, loss, tokens_per_s, left)

    def _evaluate(self, step: int) -> None:
        batches = evaluation_batches(self.held_out, self.collate, **self.shape)
        whole = (self.validation.bytes, self.objective.predicts_text)
        result = evaluate(self.engine.evaluate, self.world.sum, batches, *whole)
        values = dataclasses.asdict(result)
        self._write("eval", step, **values.pop("metrics"), **values)
        if self.log:
            bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
            self.log.say(
                f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}{bits}"
            )
        if self.config.evaluation.prompt is not None:
            self._write("sample", step, prompt=self.config.evaluation.prompt, text=self._sample())

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
    end_process()
