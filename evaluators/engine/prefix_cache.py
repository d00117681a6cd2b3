"""Hidden states behind the first blocks of genomes that will have offspring, kept within a bound of bytes."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from torch import Tensor

Chunks = list[Tensor]  # (B, T, D) states, some windows each


class PrefixCache:
    """States by what they depend on: text, and the formats of embedding and blocks. The least recently used go."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.used = 0
        self._states: OrderedDict[Hashable, Chunks] = OrderedDict()

    def clear(self) -> None:
        self._states.clear()
        self.used = 0

    def get(self, key: Hashable) -> Chunks | None:
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def put(self, key: Hashable, states: Sequence[Tensor]) -> None:
        size = size_of(states)
        if key in self._states or size > self.capacity:
            return
        while self.used + size > self.capacity:
            _, oldest = self._states.popitem(last=False)
            self.used -= size_of(oldest)
        self._states[key] = list(states)
        self.used += size


def size_of(states: Sequence[Tensor]) -> int:
    """Bytes."""
    return sum(chunk.numel() * chunk.element_size() for chunk in states)
