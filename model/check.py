"""Checks of a model's arguments; each raises ValueError with one line that begins with `model.<key>:`."""

from collections.abc import Sequence
from typing import Any


def size(key: str, value: object) -> None:
    """Refuse anything but a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"model.{key}: {value!r} is not a positive integer; give one")


def choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Refuse anything but one of the named choices."""
    if value not in choices:
        raise ValueError(f"model.{key}: {value!r} is not known; choose one of {', '.join(choices)}")


def flag(key: str, value: object) -> None:
    """Refuse anything but true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"model.{key}: {value!r} is not true or false; give one of them")


def number(key: str, value: Any, above: float, below: float, *, include_above: bool) -> None:
    """Refuse anything but a number between the bounds; only the lower one may be included."""
    in_range = isinstance(value, int | float) and not isinstance(value, bool) and value < below
    if not in_range or not (value > above or include_above and value == above):
        lower = "at least" if include_above else "above"
        raise ValueError(
            f"model.{key}: {value!r} is not a number {lower} {above:g} and below {below:g}; give one"
        )


def divides(key: str, value: int, divisor_key: str, divisor: int) -> None:
    """Refuse a value that the divisor does not divide."""
    if value % divisor:
        advice = "choose a multiple"
        raise ValueError(f"model.{key}: {value} is not divisible by {divisor_key} {divisor}; {advice}")
