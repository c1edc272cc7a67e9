"""What a run trains on: its packed data or a stream, and in which order the samples come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from data.cli import instantiate
from data.curriculum import Curriculum
from data.documents import open_documents
from data.loader import Collate, pack
from data.mix import Mixture, weights_of
from data.order import Order, Sequential
from data.packing import Joined, Packing, Sample
from data.shards import Part, read_manifest
from data.stream import StreamPacking
from data.tokenizer import load_tokenizer
from train.config import MixtureConfig, RunConfig, steps, total_steps
from train.divergence import position
from train.objective.base import Objective
from train.objective.knowledge import KnowledgeMaskedLM
from train.optim.schedules import Schedule


@dataclass(frozen=True)
class Supply:
    """packing: all samples of an epoch, or of a stream that is read onwards. order: which of them make up a
    step. steps: how many, and how long. collate: makes batches of samples as they are; collates: of the rows
    that they are cut into, by length. total_steps: of the run's horizon."""

    packing: Packing | Joined | StreamPacking
    order: Order | Mixture | Sequential
    steps: Curriculum
    collate: Collate
    collates: dict[int, Collate]
    total_steps: int

    def check_horizon(self, passed_over: int) -> None:
        """Raises ValueError where the caps of a mixture leave too little for the horizon when so many steps
        are passed over."""
        if isinstance(self.order, Mixture):
            self.order.check_horizon(self.total_steps + passed_over)

    def first_samples(self, most: int) -> list[Sample]:
        """The samples that come first in training."""
        packing = self.packing.fresh() if isinstance(self.packing, StreamPacking) else self.packing
        most = min(most, getattr(packing, "samples", most), self.steps.span(self.total_steps)[0])
        found: list[Sample] = []
        for step in count():
            if len(found) >= most:
                return found[:most]
            found += [packing.sample(int(i)) for i in self.order.step(step)]
        raise AssertionError("steps have no end")

    def tokens(self, step: int, passed_over: Sequence[int]) -> Counter[int]:
        """Tokens in the first `step` steps of a run, by the length of the sequences that they are in.

        passed_over: positions in the order that are left out, sorted.
        """
        found: Counter[int] = Counter()
        end, stages = position(step, passed_over), self.steps.stages
        for stage, following in zip_longest(stages, stages[1:]):
            until = min(end, following.step) if following else end
            left_out = sum(stage.step <= place < until for place in passed_over)
            made = max(0, until - stage.step - left_out)
            found[stage.sequence_length] += made * stage.global_batch * stage.sequence_length
        return found

    def shares(self, place: int) -> dict[str, float]:
        """The share of each part of a mixture in the samples before a place of the order."""
        if not isinstance(self.order, Mixture) or not place:
            return {}
        counts = self.order.counts(place)
        return {f"share/{part}": n / counts.sum() for part, n in zip(self.order.parts, counts, strict=True)}


@contextmanager
def reading() -> Iterator[None]:
    """A block that reads data: what is wrong with it is no bug of ours, and gets one line."""
    try:
        yield
    except ValueError as error:
        raise OSError(str(error)) from error


def check_reached(config: RunConfig, objective: Any, schedule: Any, total_steps: int) -> None:
    """Raises ValueError where a stage is never reached, or the warm-up never ends."""
    begins = {f"curriculum.{step}": step for step in config.curriculum or {}}
    begins |= {f"mixture.stages.{step}": step for step in config.mixture.stages or {}}
    if isinstance(objective, KnowledgeMaskedLM):
        begins |= {f"objective.stages.{level}": step for level, step in objective.stages.items()}
    for key, step in begins.items():
        if step >= total_steps:
            raise ValueError(
                f"{key}: begins at step {step:,}, and the horizon is {total_steps:,} steps; give an earlier"
                " step, or a longer horizon"
            )
    if isinstance(schedule, Schedule):
        schedule.check_horizon(total_steps)


def supply(config: RunConfig, objective: Any, prepared: Path) -> Supply:
    """The supply of a run from its prepared data: a pure function of both.

    Raises:
        ValueError: one line on what of packing, mixture or curriculum does not fit the data or the objective.
    """
    length, isolate = config.sequence_length, config.packing.isolate
    collate = objective.collator(prepared, length, isolate)
    plan = steps(config)
    lengths = [shorter for shorter in plan.lengths if shorter != length]
    if lengths and collate.window != length:
        raise ValueError(
            f"curriculum: a sequence of {type(objective).__name__} holds {collate.window} tokens of the text"
            f" in {length} positions, and cannot be cut into shorter ones; change global_batch only"
        )
    collates = {shorter: objective.collator(prepared, shorter, isolate) for shorter in lengths}
    manifest = read_manifest(prepared)
    if "train" not in manifest["splits"]:
        packing_and_order = _stream(config, objective, prepared, collate)
        return Supply(*packing_and_order, plan, collate, collates, total_steps(config, samples=0))
    stream = objective.training_stream(prepared)
    parts = manifest["splits"]["train"]["parts"]
    method, block = config.packing.method, config.packing.block
    if not parts:
        if config.mixture != MixtureConfig():
            raise ValueError("mixture: the data has no parts to mix; see data=mixture")
        packing = pack(stream, method, collate, training=True)
        total = total_steps(config, packing.samples)
        order = Order(packing.samples, plan, config.seed, block)
        return Supply(packing, order, plan, collate, collates, total)
    packed = {}
    for name, part in parts.items():
        try:
            packed[name] = pack(Part(stream, *part["documents"]), method, collate, training=True)
        except ValueError as error:
            raise ValueError(f"data.source.parts.{name}: {error}") from None
    joined, sizes = Joined(list(packed.values())), {name: part.samples for name, part in packed.items()}
    total = total_steps(config, joined.samples)
    mix = config.mixture
    weights = weights_of(sizes, weights=mix.weights, temperature=mix.temperature, budgets=mix.budgets)
    mixed = Mixture(
        sizes, plan, config.seed, weights=weights, epochs=mix.epochs, stages=mix.stages, block=block
    )
    mixed.check_horizon(total)
    return Supply(joined, mixed, plan, collate, collates, total)


def _stream(
    config: RunConfig, objective: Objective, prepared: Path, collate: Collate
) -> tuple[StreamPacking, Sequential]:
    """Text that is tokenized as it is read. Raises ValueError on what needs to know all of it before."""
    if config.horizon.epochs is not None:
        raise ValueError("horizon.epochs: a stream has no end; set horizon.steps, and horizon.epochs to null")
    for key, unlike in (
        ("packing.method", config.packing.method != "chunk"),
        ("packing.block", config.packing.block is not None),
        ("mixture", config.mixture != MixtureConfig()),
        ("objective", type(objective).training_stream is not Objective.training_stream),
    ):
        if unlike:
            raise ValueError(f"{key}: needs data that is prepared, not a stream; set data.shards to null")
    documents = open_documents(instantiate(config.data["source"], "data.source"), config.data["shards"])
    tokenizer = load_tokenizer(prepared / "tokenizer")
    return StreamPacking(documents, tokenizer, collate.window), Sequential(steps(config))
