"""This module runs windows of text through a block in batches, smaller ones after memory ran out."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bitgenome.common.devices import release_memory

log = logging.getLogger(__name__)

CPU_MESSAGES = ("can't allocate memory", "not enough memory")  # torch's own allocator raises a plain RuntimeError


class Batches:
    """Applies functions to tensors (B, T, ...) in batches of ``windows`` windows, of fewer after memory ran out."""

    def __init__(self, windows: int):
        self.windows = windows

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split ``rows`` (B, T, ...) into batches."""
        return rows.split(self.windows)

    def run(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Return ``function(rows)``, computed batch by batch for ``rows`` (B, T, ...).

        If memory runs out, the batch size becomes half the rows of the batch that failed, which is tried again. Raises
        what ``function`` raised if not even one window fits.
        """
        pieces = self.split(rows)
        if len(pieces) > 1:
            return torch.cat([self.run(function, piece) for piece in pieces])
        try:
            return function(rows)
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 or not out_of_memory(error):
                raise
        self.windows = len(rows) // 2
        log.warning("out of memory: from now on %d windows of text at once, not %d", self.windows, len(rows))
        release_memory()
        return self.run(function, rows)


def out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` is a failed allocation, on a device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in CPU_MESSAGES)
