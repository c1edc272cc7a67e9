"""Which samples make up step s: a pure function of the samples, the sizes of the steps, the seed, and s.

Every epoch is a keyed permutation of the samples, evaluated point by point in O(1) time and memory: a
Feistel network (Luby & Rackoff 1988, "How to construct pseudorandom permutations") on the smallest even
number of bits that holds every sample, with cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains") back into the range. There is no state, so any step is reached at once.
"""

from typing import Protocol

import numpy as np

ROUNDS = 8
MASK = 2**64 - 1


class Steps(Protocol):
    """Which positions of an endless order the steps are made of."""

    def span(self, step: int) -> tuple[int, int]:
        """The first position of a step, and how many it has. Steps follow each other without gaps. Raises
        ValueError on a negative step."""
        ...

    def rows(self, step: int) -> int:
        """How many sequences of equal length each sample of the step is cut into."""
        ...

    def check(self, micro_batch: int, world_size: int) -> None:
        """Raises ValueError where a step cannot be dealt out to so many ranks in such micro-batches."""
        ...


class Ordered(Protocol):
    """An order of training samples: which, and of which epoch each is."""

    steps: Steps

    def step(self, step: int) -> np.ndarray:
        """int64 [n]: the samples of step 0, 1, 2, ..."""
        ...

    def epochs(self, step: int) -> np.ndarray:
        """int64 [n]: the epoch, from 0, that each of them belongs to."""
        ...


class EqualSteps:
    """Steps of global_batch samples each. Raises ValueError where it is not positive."""

    def __init__(self, global_batch: int) -> None:
        if global_batch < 1:
            raise ValueError(f"global_batch: {global_batch} is not positive")
        self.global_batch = global_batch

    def span(self, step: int) -> tuple[int, int]:
        if step < 0:
            raise ValueError(f"step: {step} is negative")
        return step * self.global_batch, self.global_batch

    def rows(self, step: int) -> int:
        return 1

    def check(self, micro_batch: int, world_size: int) -> None:
        if self.global_batch % (micro_batch * world_size):
            raise ValueError(
                f"global_batch: {self.global_batch} is not divisible by micro_batch {micro_batch} x "
                f"{world_size} ranks; choose a multiple of {micro_batch * world_size}"
            )


class Order:
    """The order of training samples.

    samples: how many samples an epoch has. steps: samples per step over all ranks, or Steps. seed: any
    integer, taken modulo 2**64; another seed is another order. block: as in shuffled.
    Raises ValueError where a number is not positive.
    """

    def __init__(self, samples: int, steps: int | Steps, seed: int, block: int | None = None) -> None:
        if samples < 1:
            raise ValueError(f"order: {samples} samples; at least 1 is needed")
        check_block(block)
        self.samples = samples
        self.steps = EqualSteps(steps) if isinstance(steps, int) else steps
        self.seed = seed
        self.block = block

    def step(self, step: int) -> np.ndarray:
        """int64 [n]: the samples of step 0, 1, 2, ..., which are those at the positions steps.span(step) of
        the endless sequence of epochs."""
        epochs, places = np.divmod(positions(self.steps, step), self.samples)
        sizes = np.full(len(places), self.samples)
        return shuffled(places, epochs, sizes, np.uint64(self.seed & MASK), self.block)

    def epochs(self, step: int) -> np.ndarray:
        """int64 [n]: the epoch, from 0, that each sample of the step belongs to."""
        return positions(self.steps, step) // self.samples


class Sequential:
    """The order of a stream that is read as it comes: position p is sample p, of epoch 0."""

    def __init__(self, steps: int | Steps) -> None:
        self.steps = EqualSteps(steps) if isinstance(steps, int) else steps

    def step(self, step: int) -> np.ndarray:
        return positions(self.steps, step)

    def epochs(self, step: int) -> np.ndarray:
        return np.zeros(len(positions(self.steps, step)), np.int64)


def positions(steps: Steps, step: int) -> np.ndarray:
    """int64 [n]: the positions of a step."""
    first, count = steps.span(step)
    return first + np.arange(count)


def check_block(block: int | None) -> None:
    """Raises ValueError where samples cannot be shuffled within such blocks."""
    if block is not None and block < 1:
        raise ValueError(f"block: {block} samples is not positive; null shuffles over all")


def shuffled(
    places: np.ndarray,
    epochs: np.ndarray,
    sizes: np.ndarray,
    seeds: np.ndarray | np.uint64,
    block: int | None = None,
) -> np.ndarray:
    """int64 [n]: the samples at these places of these epochs, each epoch in an order of its own.

    places, epochs: int64 [n]. sizes: int64 [n], how many samples an epoch has. seeds: uint64, one or [n].
    block: shuffle within blocks of so many consecutive samples, so that neighbouring places are read from few
    stretches of the corpus: an epoch's blocks, of which the last may be shorter, come one after the other in
    a permuted order, and so do the samples of each. None: over all samples.
    """
    keys = _mix(_mix(seeds + np.zeros(1, np.uint64)) ^ epochs.astype(np.uint64))
    places, sizes = places.astype(np.uint64), sizes.astype(np.uint64)
    if block is None:
        return _permuted(places, sizes, keys).astype(np.int64)
    block_N = np.minimum(np.uint64(block), sizes)
    blocks = (sizes + block_N - np.uint64(1)) // block_N
    last, missing = blocks - np.uint64(1), blocks * block_N - sizes
    order_keys, block_keys = _mix(keys + np.uint64(ROUNDS)), _mix(keys + np.uint64(ROUNDS + 1))
    # The slot of the last block begins where it would if that were whole; those after it begin earlier.
    last_slot = _permuted(last, blocks, order_keys, backwards=True)
    behind = places >= (last_slot + np.uint64(1)) * block_N - missing
    slots, places = np.divmod(np.where(behind, places + missing, places), block_N)
    of = _permuted(slots, blocks, order_keys)
    within = _permuted(places, np.where(of == last, block_N - missing, block_N), _mix(block_keys ^ of))
    return (of * block_N + within).astype(np.int64)


def _permuted(index: np.ndarray, sizes: np.ndarray, keys: np.ndarray, backwards: bool = False) -> np.ndarray:
    """Where each key's permutation of range(size), or its inverse, takes an index. All are uint64 [n]."""
    bits = _half_bits(sizes)
    rounds = np.stack([_mix(keys + np.uint64(r)) for r in range(ROUNDS)])
    feistel = _unfeistel if backwards else _feistel
    result = feistel(index, bits, rounds)
    outside = np.flatnonzero(result >= sizes)
    while outside.size:  # the domain is below 4 * size: 4 rounds on average at the worst
        result[outside] = feistel(result[outside], bits[outside], rounds[:, outside])
        outside = outside[result[outside] >= sizes[outside]]
    return result


def _half_bits(sizes: np.ndarray) -> np.ndarray:
    """uint64 [n]: half of the smallest even number of bits that holds range(size)."""
    distinct, which = np.unique(sizes, return_inverse=True)
    bits = [((size - 1).bit_length() + 1) // 2 for size in distinct.tolist()]
    return np.array(bits, np.uint64)[which]


def _feistel(value: np.ndarray, bits: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = value >> bits, value & mask
    for keys in rounds:
        left, right = right, left ^ (_mix(right ^ keys) & mask)
    return (left << bits) | right


def _unfeistel(value: np.ndarray, bits: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = value >> bits, value & mask
    for keys in rounds[::-1]:
        left, right = right ^ (_mix(left ^ keys) & mask), left
    return (left << bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 output function (Steele et al. 2014): a bijection of uint64 that mixes every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
