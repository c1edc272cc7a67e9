"""Which samples make up step s: a pure function of (samples, global batch, seed, s).

Every epoch is a keyed permutation of the samples, evaluated point by point in O(1) time and memory: a
Feistel network (Luby & Rackoff 1988, "How to construct pseudorandom permutations") on the smallest even
number of bits that holds every sample, with cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains") back into the range. There is no state, so any step is reached at once.
"""

import numpy as np

ROUNDS = 8


class Order:
    """The order of training samples.

    samples: how many samples an epoch has. global_batch: samples per step, over all ranks.
    seed: any integer, taken modulo 2**64; another seed is another order.
    Raises ValueError where a number is not positive.
    """

    def __init__(self, samples: int, global_batch: int, seed: int) -> None:
        if samples < 1:
            raise ValueError(f"order: {samples} samples; at least 1 is needed")
        if global_batch < 1:
            raise ValueError(f"global_batch: {global_batch} is not positive")
        self.samples = samples
        self.global_batch = global_batch
        self.seed = seed
        self._half_bits = np.uint64(((samples - 1).bit_length() + 1) // 2)

    def step(self, step: int) -> np.ndarray:
        """int64 [global_batch]: the samples of step 0, 1, 2, ... Sample j of the step stands at position
        p = step * global_batch + j of the endless sequence of epochs."""
        epoch, index = self._places(step)
        return self._permute(index, self._round_keys(epoch)).astype(np.int64)

    def epochs(self, step: int) -> np.ndarray:
        """int64 [global_batch]: the epoch, from 0, that each sample of the step belongs to."""
        return self._places(step)[0].astype(np.int64)

    def _places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """uint64 [global_batch] each: the epoch of each sample of the step, and its place in that epoch."""
        if step < 0:
            raise ValueError(f"step: {step} is negative")
        places = [divmod(step * self.global_batch + j, self.samples) for j in range(self.global_batch)]
        epoch, index = zip(*places, strict=True)
        return np.array(epoch, np.uint64), np.array(index, np.uint64)

    def _round_keys(self, epoch: np.ndarray) -> np.ndarray:
        """uint64 [ROUNDS, n]: the keys of each sample's epoch."""
        key = _mix(_mix(np.array([self.seed & (2**64 - 1)], dtype=np.uint64)) ^ epoch)
        return np.stack([_mix(key + np.uint64(r)) for r in range(ROUNDS)])

    def _permute(self, index: np.ndarray, keys: np.ndarray) -> np.ndarray:
        if self.samples == 1:  # the network has no bits to work on
            return index
        result = self._feistel(index, keys)
        outside = np.flatnonzero(result >= self.samples)
        while outside.size:  # the domain is below 4 * samples: 4 rounds on average at the worst
            result[outside] = self._feistel(result[outside], keys[:, outside])
            outside = outside[result[outside] >= self.samples]
        return result

    def _feistel(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits = self._half_bits
        mask = (np.uint64(1) << bits) - np.uint64(1)
        left, right = value >> bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 output function (Steele et al. 2014): a bijection of uint64 that mixes every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
