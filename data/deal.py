"""Positions dealt out to parts in an exact proportion, each found at once.

Every position goes down a tree of two-way choices: of the first n draws of a node of weight w,
round(n * a / w) are its child's of weight a. All numbers are integers, so that every machine deals alike. The
tree is Huffman's (1952, "A method for the construction of minimum-redundancy codes"), whose weights grow at
least as Fibonacci's numbers towards the root: with at most half a draw of rounding on each level, no part is
ever further than (1 + 1 + 1/2 + 1/3 + 1/5 + ...) / 2 < 1.7 draws from its share.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST = 2**62  # of what int64 computes with


class Deal:
    """Deals positions 0, 1, 2, ... out in proportion to integer weights, of which one is positive."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.size = len(weights)
        nodes = [_Node(weight, part=part) for part, weight in enumerate(weights) if weight]
        heap = [(node.weight, order, node) for order, node in enumerate(nodes)]
        heapq.heapify(heap)
        order = len(heap)  # decides among equals
        while len(heap) > 1:
            (_, _, small), (_, _, large) = heapq.heappop(heap), heapq.heappop(heap)
            node = _Node(small.weight + large.weight, large, small)
            heapq.heappush(heap, (node.weight, order, node))
            order += 1
        self._root = heap[0][2]

    def counts(self, positions: int) -> list[int]:
        """How many of the first `positions` each part gets."""
        result = [0] * self.size

        def down(node: _Node, draws: int) -> None:
            if node.left is None or node.right is None:
                result[node.part] = draws
                return
            left = node.left_of(draws)
            down(node.left, left)
            down(node.right, draws - left)

        down(self._root, positions)
        return result

    def parts(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the parts that positions first, ..., first + count - 1 go to."""
        result = np.empty(count, np.int64)

        def down(node: _Node, first: int, places: np.ndarray) -> None:
            if node.left is None or node.right is None:
                result[places] = node.part
            elif len(places):
                before = node.left_of(first)
                is_left = np.diff(node.left_after(first, len(places))).astype(bool)
                down(node.left, before, places[is_left])
                down(node.right, first - before, places[~is_left])

        down(self._root, first, np.arange(count))
        return result

    def position(self, part: int, draw: int) -> int:
        """Where the draw'th of `part`, from 0, stands. Its weight must be positive."""

        def up(node: _Node) -> int | None:
            if node.left is None or node.right is None:
                return draw if node.part == part else None
            if (left := up(node.left)) is not None:
                return -(-(2 * left + 1) * node.weight // (2 * node.left.weight)) - 1
            if (right := up(node.right)) is not None:
                return (2 * right + 1) * node.weight // (2 * node.right.weight)
            return None

        found = up(self._root)
        assert found is not None
        return found


@dataclass(frozen=True)
class _Node:
    """A part, or two nodes that share its draws."""

    weight: int
    left: _Node | None = None
    right: _Node | None = None
    part: int = -1

    def left_of(self, draws: int) -> int:
        """How many of the first `draws` are the left node's: its share, rounded, halves upwards."""
        assert self.left is not None
        return (2 * draws * self.left.weight + self.weight) // (2 * self.weight)

    def left_after(self, first: int, count: int) -> np.ndarray:
        """[count + 1]: left_of(first), ..., left_of(first + count), each less a number common to all."""
        assert self.left is not None
        rest = (2 * first * self.left.weight + self.weight) % (2 * self.weight)
        small = 2 * self.weight * (count + 2) < LARGEST
        draws = np.arange(count + 1) if small else np.arange(count + 1).astype(object)
        return (rest + 2 * self.left.weight * draws) // (2 * self.weight)
