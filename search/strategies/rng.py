"""Random state as JSON."""

import random
from typing import Any


def rng_to_json(rng: random.Random) -> list[Any]:
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def rng_from_json(state: list[Any]) -> random.Random:
    version, words, gauss = state
    rng = random.Random()
    rng.setstate((version, tuple(words), gauss))
    return rng
