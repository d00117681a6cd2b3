"""This module caches hidden states after the first blocks of genomes that will have offspring."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from torch import Tensor

Chunks = list[Tensor]  # hidden states (B, T, D), some windows in each chunk


class PrefixCache:
    """Caches hidden states in at most ``capacity`` bytes; the least recently used entries are dropped first.

    A key names what the states depend on: the text, and the formats of the lookup tables and of the blocks before them.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.used = 0
        self._states: OrderedDict[Hashable, Chunks] = OrderedDict()

    def clear(self) -> None:
        """Drop all entries."""
        self._states.clear()
        self.used = 0

    def get(self, key: Hashable) -> Chunks | None:
        """Return the states of ``key``, not a copy, and mark them as used; None if there are none."""
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def put(self, key: Hashable, states: Sequence[Tensor]) -> None:
        """Add ``states`` under ``key``, unless the key is there already or they are larger than the whole cache."""
        size = size_of(states)
        if key in self._states or size > self.capacity:
            return
        while self.used + size > self.capacity:
            _, oldest = self._states.popitem(last=False)
            self.used -= size_of(oldest)
        self._states[key] = list(states)
        self.used += size


def size_of(states: Sequence[Tensor]) -> int:
    """Return the bytes that ``states`` take."""
    return sum(chunk.numel() * chunk.element_size() for chunk in states)
