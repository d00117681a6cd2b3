"""This module provides a model's tensors, in full precision or decoded from the bank, and keeps as many as fit."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from bitgenome.common.devices import release_memory
from evaluators.model.block_model import BlockModel
from evaluators.prepare.bank import decoded
from quantizers.formats.table import QuantFormat

PAGE_BYTES = 4096
WeightKey = tuple[str, QuantFormat | None]  # Hugging Face name and format; None: full precision


class PackedTensors(Protocol):
    """Holds packed tensors by name and format: a bank, or a file."""

    def packed(self, tensor: str, fmt: QuantFormat) -> Tensor:
        """Return the bytes uint8 (rows, row_bytes) of a GGUF file."""


class ModelWeights:
    """Provides weights by name and format on the model's device, and caches up to ``capacity`` bytes of them.

    A model that fits is resident: every weight stays after its first use. A larger one is streamed. Then the first
    weights asked for stay for good, in all but ``reserve`` bytes; others stay until the next ``release``, as far as
    there is room. Blocks are used in a cycle, so the least recently used weight is always the next one needed, and
    replacing it would be of no use.
    """

    def __init__(self, model: BlockModel, bank: PackedTensors, capacity: int, reserve: int = 0):
        self.model = model
        self.bank = bank
        self.capacity = capacity
        self._stays = _Held(capacity - reserve)
        self._passes = _Held(capacity)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._coming: dict[WeightKey, Future[Tensor]] = {}
        self._made = False  # whether a weight was read or decoded since the last release

    def get(self, name: str, fmt: QuantFormat | None) -> Tensor:
        """Return a weight (rows, columns), or (columns,) of a norm or bias, from the cache if it is there.

        Raises KeyError or BankError for a tensor or format that folder or bank do not hold.
        """
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
        """Start reading the weights that will be needed next, in a thread, while the device computes."""
        for key in keys:
            held = key in self._stays.weights or key in self._passes.weights
            if not held and key not in self._coming:
                self._coming[key] = self._reader.submit(self._fetched, *key)

    def release(self) -> None:
        """Free the weights that do not stay, and give unused memory of allocators back.

        The latter is skipped for a resident model if nothing was read or decoded since the last call.
        """
        self._passes = _Held(self.capacity)
        if self._made or self._stays.room < self.capacity:
            release_memory()
        self._made = False

    def close(self) -> None:
        """Drop all weights, and stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._coming = {}
        self._stays = self._passes = _Held(0)

    def rows(self, name: str, fmt: QuantFormat | None, rows: Tensor) -> Tensor:
        """Return the rows (len(rows), columns) of a matrix with the indices ``rows``, without decoding the others."""
        if (kept := self._stays.weights.get((name, fmt))) is not None:
            return kept[rows.to(kept.device)]
        return self._computed(name, fmt, self._stored(name, fmt)[rows.cpu()])

    def _make(self, name: str, fmt: QuantFormat | None) -> Tensor:
        self._made = True
        coming = self._coming.pop((name, fmt), None)
        return self._computed(name, fmt, coming.result() if coming else self._stored(name, fmt))

    def _computed(self, name: str, fmt: QuantFormat | None, stored: Tensor) -> Tensor:
        """Decode ``stored``, all or some rows of a weight, and move it to the device in its compute type."""
        if fmt is not None:
            stored = decoded(fmt, stored, self.model.folder.shapes[name][-1], self.model.device)
        return self.model.as_computed(name, stored)

    def _stored(self, name: str, fmt: QuantFormat | None) -> Tensor:
        return self.model.folder.read(name) if fmt is None else self.bank.packed(name, fmt)

    def _fetched(self, name: str, fmt: QuantFormat | None) -> Tensor:
        """Return the stored tensor after reading its mapped pages; in pinned memory if the device is an accelerator."""
        stored = self._stored(name, fmt)
        if self.model.device.type != "cpu":
            return stored.pin_memory()
        stored.flatten().view(torch.uint8)[::PAGE_BYTES].sum()
        return stored


def embedded(weights: ModelWeights, formats: Mapping[str, QuantFormat], ids: Tensor, windows: int) -> Iterator[Tensor]:
    """Yield the embeddings of token ids (B, T), on the model's device, for ``windows`` windows at a time.

    Only those rows of the lookup tables, in their ``formats``, are decoded that the text uses.
    """
    model = weights.model
    used, places = ids.unique(return_inverse=True)
    for name in model.lookup_names:
        model.place(name, weights.rows(name, formats.get(name), used))
    for name in model.entry_parameters:
        model.place(name, weights.get(name, None))
    yield from (model.embed(rows) for rows in places.split(windows))
    for name in (*model.lookup_names, *model.entry_parameters):
        model.place(name, None)


class _Held:
    """Holds weights of up to ``room`` bytes together."""

    def __init__(self, room: int):
        self.room = room
        self.used = 0
        self.weights: dict[WeightKey, Tensor] = {}

    def take(self, key: WeightKey, weight: Tensor) -> bool:
        """Add ``weight`` if there is room for it, and return whether there was."""
        size = weight.numel() * weight.element_size()
        if fits := self.used + size <= self.room:
            self.weights[key] = weight
            self.used += size
        return fits
