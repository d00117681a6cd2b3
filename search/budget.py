"""Budgets as an exact number of file bytes, made from bits per weight, a compression ratio or a size.

A budget is always an integer of bytes; the other units occur only in its constructors.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from search.types import SearchSpace

F16_BYTES = 2  # bytes of one weight of the model that a compression ratio is measured against
ROUNDING_BYTES = 1e-3  # forgives the float rounding of "bits x weights / 8"; far below one byte
SIZE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
SIZE_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Budget:
    """A budget is the largest GGUF file allowed, in bytes.

    Build one with a ``from_`` constructor. They raise ValueError, with both bounds in the unit asked for, if the budget
    is below the smallest or above the largest file of the space.
    """

    file_bytes: int

    @classmethod
    def from_bits_per_weight(cls, space: SearchSpace, bits: float) -> "Budget":
        """Return the budget of ``bits`` bits per weight: bits of the whole file over all weights of the model.

        SearchSpace.bits_per_weight counts in the same way. Raises ValueError if ``bits`` is not finite or cannot be
        met.
        """
        scale = space.weights / 8
        return _checked(space, _floor(bits * scale), f"{bits:g} bits per weight", scale, "{:.4f} bits per weight")

    @classmethod
    def from_compression(cls, space: SearchSpace, ratio: float) -> "Budget":
        """Return the budget of ``ratio``: file bytes over the bytes of the same weights at F16.

        A ratio of 0.25 is four bits per weight. Raises ValueError if ``ratio`` is not finite or cannot be met.
        """
        scale = F16_BYTES * space.weights
        return _checked(space, _floor(ratio * scale), f"compression {ratio:g}", scale, "compression {:.4f}")

    @classmethod
    def from_size(cls, space: SearchSpace, size: int | str) -> "Budget":
        """Return the budget of ``size``: bytes, or a string such as "3.2 MiB", "2GiB" (binary) or "4.5GB" (decimal).

        Raises ValueError if ``size`` is not a size or cannot be met.
        """
        unit, suffix = _unit_of(size)
        return _checked(space, parse_size(size), f"size {size}", unit, "{:.4f} " + suffix if suffix else "{:.0f} bytes")


def parse_size(size: int | str) -> int:
    """Return ``size`` in whole bytes, rounded down. Raises ValueError for a string that is not a size."""
    if isinstance(size, int):
        return size
    unit, _ = _unit_of(size)
    match = SIZE_PATTERN.fullmatch(size)
    assert match is not None  # _unit_of has just matched it
    return math.floor(Fraction(match[1]) * unit)


def _unit_of(size: int | str) -> tuple[int, str]:
    """Return the bytes of the unit of ``size``, and the unit as the user wrote it ("" for bytes)."""
    if isinstance(size, int):
        return 1, ""
    match = SIZE_PATTERN.fullmatch(size)
    if match is None or match[2].lower() not in SIZE_UNITS:
        raise ValueError(
            f"size {size!r} is not a number of bytes with one of the units KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    return SIZE_UNITS[match[2].lower()], match[2] if match[2].lower() not in ("", "b") else ""


def _floor(size: float) -> int:
    """Round ``size`` down to whole bytes. Raises ValueError if it is not finite."""
    if not math.isfinite(size):
        raise ValueError(f"budget must be a finite number, found {size}")
    return math.floor(size + ROUNDING_BYTES)


def _checked(space: SearchSpace, file_bytes: int, asked: str, scale: float, words: str) -> Budget:
    """Return the budget of ``file_bytes``; raise ValueError if the space cannot meet it.

    ``asked`` is the request in the user's words. For the message, ``words`` formats bytes / ``scale``, a figure in the
    user's unit.
    """
    smallest, largest = space.file_bytes(space.smallest()), space.file_bytes(space.largest())
    if smallest <= file_bytes <= largest:
        return Budget(file_bytes)
    if smallest == largest:
        raise ValueError(
            f"budget of {asked} ({file_bytes:,} bytes) cannot be met: with these levels this model's files have one "
            f"size, file_size: {smallest}"
        )
    low, high = words.format(_rounded(smallest / scale, math.ceil)), words.format(_rounded(largest / scale, math.floor))
    raise ValueError(
        f"budget of {asked} ({file_bytes:,} bytes) cannot be met: this model's files lie between {low} "
        f"({smallest:,} bytes) and {high} ({largest:,} bytes)"
    )


def _rounded(value: float, direction: Callable[[float], int]) -> float:
    """Round ``value`` to four decimals in ``direction``, inwards: a bound printed in a message is itself accepted."""
    return direction(value * 10**4) / 10**4
