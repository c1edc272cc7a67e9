"""What the first samples of a run say before it trains on them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from data.loader import evaluation_batches
from data.packing import Packing
from data.stream import StreamPacking
from train.config import RunConfig
from train.eval.evaluate import unigram_loss
from train.journal import Journal
from train.objective.base import Objective
from train.supply import Supply, reading

UNIGRAM_TOKENS = 2**20  # of training text that the unigram model counts


def look_ahead(
    journal: Journal,
    config: RunConfig,
    supply: Supply,
    objective: Objective,
    held_out: Packing,
    manifest: dict[str, Any],
    micro_batch: int,
) -> None:
    """Record how well positions are used, and what a unigram model would lose. Raises OSError where the
    text cannot be read."""
    with reading():
        samples = supply.first_samples(1 + UNIGRAM_TOKENS // config.sequence_length)
    starts = range(0, len(samples), micro_batch)
    training = [supply.collate(samples[first : first + micro_batch]) for first in starts]
    used, positions = map(sum, zip(*map(objective.used, training), strict=True))
    line = f"packing.{config.packing.method}: {used / positions:.2%} of the positions used"
    usage: dict[str, int] = {}
    if not isinstance(supply.packing, StreamPacking):
        usage = asdict(supply.packing.usage())
        line += (
            f" (of {len(samples):,} samples), {usage['cut_documents']:,} of"
            f" {manifest['splits']['train']['documents']:,} documents cut,"
            f" {usage['dropped_tokens']:,} tokens dropped"
        )
    journal.write("packing", 0, used_share=used / positions, **usage)
    journal.say(line)
    batches = evaluation_batches(held_out, supply.collate, micro_batch=micro_batch, rank=0, world_size=1)
    loss = unigram_loss(training, batches, manifest["vocabulary_size"])
    baselines = manifest["splits"]["validation"]
    compressed = {key: baselines[key] for key in ("gzip_bits_per_byte", "xz_bits_per_byte")}
    journal.write("baseline", 0, unigram_loss=loss, **compressed)
