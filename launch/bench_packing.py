"""What it costs to keep packed documents apart: a step with documents beside one without, in turn.

Forward and backward of a GPT on the same tokens, once as one causal text a sequence and once with the ids of
documents. Other load falls on neighbouring steps alike, so that their ratio is what holds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.bench_training import SMALL, Shape, build
from train.hardware import DTYPES

SHAPES = (SMALL, dataclasses.replace(SMALL, name="small, longer", sequence_length=512, batch=8))
PRECISIONS = ("bf16", "fp32")
MEANS = {"whole": None, "500": 500, "100": 100, "25": 25}  # tokens of a document; None: one is a sequence
SPREAD = 1.0  # standard deviation of the logarithm of a document's length
PLAIN = "plain"


def document_ids(shape: Shape, mean: int | None, random: np.random.Generator) -> Tensor:
    """int32 [B, T]: documents of log-normal lengths, one after the other, cut where a sequence ends."""
    ids = np.zeros(shape.tokens, np.int32)
    if mean is not None:
        enough = 10 + 4 * shape.tokens // mean
        lengths = random.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, enough)
        starts = np.cumsum(np.maximum(1, lengths.round().astype(np.int64)))
        ids[starts[starts < shape.tokens]] = 1
    return torch.from_numpy(ids.cumsum(dtype=np.int32).reshape(shape.batch, shape.sequence_length))


def packing(
    rounds: int, advance: Callable[[], object], shapes: tuple[Shape, ...] = SHAPES
) -> list[dict[str, Any]]:
    """Of each shape and precision: median seconds of a plain step, and how many times as long one takes with
    documents of each mean length: the median over the rounds, and best step / best step. The first round
    does not count.

    advance: called after each round, `len(shapes) * len(PRECISIONS) * rounds` times.
    """
    results = []
    for shape in shapes:
        for precision in PRECISIONS:
            seconds = _seconds(shape, precision, rounds, advance)
            ratios, best = {}, {}
            for name in MEANS:
                pairs = list(zip(seconds[PLAIN], seconds[name], strict=True))[1:]
                ratios[name] = median(packed / plain for plain, packed in pairs)
                best[name] = min(packed for _, packed in pairs) / min(plain for plain, _ in pairs)
            results.append(
                {
                    "sequence_length": shape.sequence_length,
                    "batch": shape.batch,
                    "precision": precision,
                    "plain_s": median(seconds[PLAIN][1:]),
                    "ratios": ratios,
                    "ratios_best": best,
                }
            )
    return results


def _seconds(
    shape: Shape, precision: str, rounds: int, advance: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of each round's steps."""
    model, random = build(shape).to(DTYPES[precision]), np.random.default_rng(0)
    tokens = torch.from_numpy(random.integers(shape.vocabulary_size, size=shape.tokens))
    tokens = tokens.view(shape.batch, shape.sequence_length)
    batches: dict[str, Tensor | None] = {PLAIN: None}
    batches |= {name: document_ids(shape, mean, random) for name, mean in MEANS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(rounds):
        for name, ids in batches.items():
            start = time.perf_counter()
            model(tokens, tokens, documents_BT=ids).backward()
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad()
        advance()
    return seconds
