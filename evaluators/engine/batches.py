"""How many windows of text go through a block at once."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bitgenome.common.devices import release_memory

log = logging.getLogger(__name__)

CPU_MESSAGES = ("can't allocate memory", "not enough memory")  # torch's own allocator raises a plain RuntimeError


class Batches:
    """Runs (B, T, ...) tensors through functions of windows, ``windows`` at once, fewer once memory ran out."""

    def __init__(self, windows: int):
        self.windows = windows

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.windows)

    def run(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``function`` of ``rows``; where that needs more memory than there is, of halves, which becomes the rule.

        Raises what ``function`` raised if one window is too much already.
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
    """Whether ``error`` is an allocation that failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in CPU_MESSAGES)
