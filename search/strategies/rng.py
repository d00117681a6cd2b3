"""Conversion of random generators to and from JSON."""

import random
from typing import Any


def rng_to_json(rng: random.Random) -> list[Any]:
    """Return the state of ``rng`` as a JSON-serializable list."""
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def rng_from_json(state: list[Any]) -> random.Random:
    """Return a generator in the state that rng_to_json recorded."""
    version, words, gauss = state
    rng = random.Random()
    rng.setstate((version, tuple(words), gauss))
    return rng
