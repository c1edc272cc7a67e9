"""The search for a learning rate and a weight decay: a row of learning rates, then steps from the best.

A point is (x, y): the default learning rate times ratio**x, the default weight decay times ratio**y. What is
looked at next follows from what has been found alone, so a search that was broken off goes on the same way,
and every search looks at equally many points.
"""

from __future__ import annotations

from collections.abc import Mapping

Point = tuple[float, float]
NAMES = ("learning rate", "weight decay")


def following(losses: Mapping[Point, float], runs: int, row: int, decays: bool) -> list[Point]:
    """The points to look at next; none when `runs` have been.

    At first a row of learning rates around the default; then the neighbours of the best so far in learning
    rate, outside where it stands at the edge; then those in weight decay; then those at half the distance.

    Args:
        losses: at the points so far; infinite where a run diverged.
        row: learning rates at first.
        decays: whether there is a weight decay to search for.
    """
    if not losses:
        return [(float(x - row // 2), 0.0) for x in range(row)][:runs]
    x, y = best(losses)
    distance = 1.0
    while any(value % distance for point in losses for value in point):
        distance /= 2
    while True:
        rates = (x - distance, y), (x + distance, y)
        decayed = ((x, y - distance), (x, y + distance)) if decays else ()
        for near in (rates, decayed):
            if found := [point for point in near if point not in losses]:
                return found[: runs - len(losses)]
        distance /= 2


def best(losses: Mapping[Point, float]) -> Point:
    """The point of the lowest loss; of equal ones that of the lowest learning rate."""
    return min(losses, key=lambda point: (losses[point], *point))


def edges(losses: Mapping[Point, float]) -> list[str]:
    """In words, where the best point is the highest or lowest that was looked at."""
    found = []
    for name, value, values in zip(NAMES, best(losses), zip(*losses, strict=True), strict=True):
        for word, edge in (("lowest", min(values)), ("highest", max(values))):
            if value == edge and len(set(values)) > 1:
                found.append(f"{word} {name}")
    return found
