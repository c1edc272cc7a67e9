"""What a run trains on: the packed parts of its data, and in which order their samples come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.curriculum import Curriculum
from data.loader import Collate, pack
from data.mix import Mixture, weights_of
from data.order import Order
from data.packing import Joined, Packing
from data.shards import Part, read_manifest
from train.config import MixtureConfig, RunConfig, steps, total_steps


@dataclass(frozen=True)
class Supply:
    """packing: all samples of an epoch. order: which of them make up a step. steps: how many, and how long.
    collate: makes batches of samples as they are; collates: of the rows that they are cut into, by length.
    total_steps: of the run's horizon."""

    packing: Packing | Joined
    order: Order | Mixture
    steps: Curriculum
    collate: Collate
    collates: dict[int, Collate]
    total_steps: int

    def shares(self, place: int) -> dict[str, float]:
        """The share of each part of a mixture in the samples before a place of the order."""
        if not isinstance(self.order, Mixture) or not place:
            return {}
        counts = self.order.counts(place)
        return {f"share/{part}": n / counts.sum() for part, n in zip(self.order.parts, counts, strict=True)}


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
    stream = objective.training_stream(prepared)
    parts = read_manifest(prepared)["splits"]["train"]["parts"]
    method, block = config.packing.method, config.packing.block
    if not parts:
        if config.mixture != MixtureConfig():
            raise ValueError("mixture: the data has no parts to mix; see data=mixture")
        packing = pack(stream, method, collate, training=True)
        total = total_steps(config, packing.samples)
        order = Order(packing.samples, plan, config.seed, block)
        return Supply(packing, order, plan, collate, collates, total)
    packed = {
        name: pack(Part(stream, *part["documents"]), method, collate, training=True)
        for name, part in parts.items()
    }
    joined, sizes = Joined(list(packed.values())), {name: part.samples for name, part in packed.items()}
    total = total_steps(config, joined.samples)
    mix = config.mixture
    weights = weights_of(sizes, weights=mix.weights, temperature=mix.temperature, budgets=mix.budgets)
    mixed = Mixture(
        sizes, plan, config.seed, weights=weights, epochs=mix.epochs, stages=mix.stages, block=block
    )
    mixed.check_horizon(total)
    return Supply(joined, mixed, plan, collate, collates, total)
