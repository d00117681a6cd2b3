"""The tensors of a model, as stored or as the bank's bytes decode: kept as far as memory allows, else made again."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from bitgenome.common.devices import release_memory
from evaluators.model.block_model import BlockModel
from evaluators.prepare.bank import Bank, decoded
from quantizers.formats.table import QuantFormat

PAGE_BYTES = 4096
WeightKey = tuple[str, QuantFormat | None]  # Hugging Face name and format; None: full precision


class ModelWeights:
    """Weights by name and format on the model's device.

    Up to ``capacity`` bytes stay once they were asked for, so a model that fits is resident. One that does not is
    streamed: what was asked for since the last ``release`` stays as far as there is room beside the rest, which keeps
    a ``reserve`` free for it. The first to come stay: blocks are asked for in a cycle, in which the least recently used
    one is always the next.
    """

    def __init__(self, model: BlockModel, bank: Bank, capacity: int, reserve: int = 0):
        self.model = model
        self.bank = bank
        self.capacity = capacity
        self._stays = _Held(capacity - reserve)
        self._passes = _Held(capacity)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._coming: dict[WeightKey, Future[Tensor]] = {}
        self._made = False  # any since the last release

    def get(self, name: str, fmt: QuantFormat | None) -> Tensor:
        """(rows, columns), or (columns,) of a norm or bias."""
        key = (name, fmt)
        for held in (self._stays, self._passes):
            if (weight := held.weights.get(key)) is not None:
                return weight
        weight = self._make(name, fmt)
        if not self._stays.take(key, weight):
            self._passes.room = self.capacity - self._stays.used
            self._passes.take(key, weight)
        return weight

    def fetch_ahead(self, keys: Iterable[WeightKey]) -> None:
        """Begin to read what will be asked for next, while the device computes."""
        for key in keys:
            held = key in self._stays.weights or key in self._passes.weights
            if not held and key not in self._coming:
                self._coming[key] = self._reader.submit(self._fetched, *key)

    def release(self) -> None:
        """Give up what does not stay, and what allocators keep of decoding, or of anything where room is short."""
        self._passes = _Held(self.capacity)
        if self._made or self._stays.room < self.capacity:
            release_memory()
        self._made = False

    def rows(self, name: str, fmt: QuantFormat | None, rows: Tensor) -> Tensor:
        """(len(rows), columns): some rows of a matrix that may be too large to be here whole."""
        if (kept := self._stays.weights.get((name, fmt))) is not None:
            return kept[rows.to(kept.device)]
        return self._computed(name, fmt, self._stored(name, fmt)[rows.cpu()])

    def _make(self, name: str, fmt: QuantFormat | None) -> Tensor:
        self._made = True
        coming = self._coming.pop((name, fmt), None)
        return self._computed(name, fmt, coming.result() if coming else self._stored(name, fmt))

    def _computed(self, name: str, fmt: QuantFormat | None, stored: Tensor) -> Tensor:
        """Some or all rows as the model multiplies them."""
        if fmt is not None:
            stored = decoded(fmt, stored, self.model.folder.shapes[name][-1], self.model.device)
        return self.model.as_computed(name, stored)

    def _stored(self, name: str, fmt: QuantFormat | None) -> Tensor:
        return self.model.folder.read(name) if fmt is None else self.bank.packed(name, fmt)

    def _fetched(self, name: str, fmt: QuantFormat | None) -> Tensor:
        """What is stored, read and not only mapped; for an accelerator, where it can copy from at once."""
        stored = self._stored(name, fmt)
        if self.model.device.type != "cpu":
            return stored.pin_memory()
        stored.flatten().view(torch.uint8)[::PAGE_BYTES].sum()
        return stored


class _Held:
    """Weights up to ``room`` bytes."""

    def __init__(self, room: int):
        self.room = room
        self.used = 0
        self.weights: dict[WeightKey, Tensor] = {}

    def take(self, key: WeightKey, weight: Tensor) -> bool:
        """Whether there was room for it."""
        size = weight.numel() * weight.element_size()
        if fits := self.used + size <= self.room:
            self.weights[key] = weight
            self.used += size
        return fits
